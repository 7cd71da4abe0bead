//! The trainer against a naive one, which counts all pairs anew for every merge; the encoder against the merges.

use std::collections::{BTreeMap, HashSet};

use proptest::prelude::*;
use rustbpe::count::{Pieces, count_pieces};
use rustbpe::encode::Encoder;
use rustbpe::split::{DEFAULT_PATTERN, Splitter};
use rustbpe::train::train;
use rustbpe::{Error, Pair};

/// Replaces `pair` by `token` from the left.
fn merged(word: &[u32], pair: Pair, token: u32) -> Vec<u32> {
    let (mut result, mut at) = (Vec::new(), 0);
    while at < word.len() {
        if word[at..].starts_with(&[pair.0, pair.1]) {
            result.push(token);
            at += 2;
        } else {
            result.push(word[at]);
            at += 1;
        }
    }
    result
}

/// The definition of the merges, in quadratic time.
fn naive(texts: &[String], vocab_size: u32) -> Vec<Pair> {
    let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
    let mut words: Vec<Vec<u32>> = Vec::new();
    for text in texts {
        let word = |piece: &str| piece.bytes().map(u32::from).collect();
        splitter
            .for_each_piece(text, |piece| words.push(word(piece)))
            .unwrap();
    }
    let mut merges = Vec::new();
    for token in 256..vocab_size {
        let mut counts: BTreeMap<Pair, u64> = BTreeMap::new();
        for pair in words.iter().flat_map(|word| word.windows(2)) {
            *counts.entry((pair[0], pair[1])).or_default() += 1;
        }
        let Some(most) = counts.values().copied().max() else {
            break;
        };
        // A BTreeMap is in the order of its keys: the first is the smallest pair.
        let pair = counts
            .into_iter()
            .find(|&(_, count)| count == most)
            .unwrap()
            .0;
        for word in &mut words {
            *word = merged(word, pair, token);
        }
        merges.push(pair);
    }
    merges
}

fn counted(texts: &[String], num_threads: usize, batch: usize) -> Pieces {
    let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
    let mut batches = texts.chunks(batch).map(<[String]>::to_vec);
    count_pieces(&splitter, num_threads, || Ok::<_, Error>(batches.next())).unwrap()
}

fn encoder(merges: Vec<Pair>) -> Encoder {
    Encoder::new(Splitter::new(DEFAULT_PATTERN).unwrap(), merges)
}

#[test]
fn equal_counts_take_the_smaller_pair() {
    let texts = ["zz bd ac".to_string()];
    // " a", " b" and "ac", "bd", "zz" occur once each; a space is the smallest byte.
    let merges = train(&counted(&texts, 1, 1), 259).unwrap();
    assert_eq!(merges, [(32, 97), (32, 98), (122, 122)]);
}

#[test]
fn repeated_letters_merge_from_the_left() {
    let texts = ["aaaaaaa".to_string()];
    let merges = train(&counted(&texts, 1, 1), 1000).unwrap();
    assert_eq!(merges, naive(&texts, 1000));
    assert_eq!(merges[0], (97, 97));
    assert_eq!(
        encoder(merges[..1].to_vec()).encode("aaaaa").unwrap(),
        [256, 256, 97]
    );
}

#[test]
fn vocabulary_below_the_bytes() {
    assert_eq!(train(&Pieces::default(), 255), Err(Error::VocabSize(255)));
    assert_eq!(train(&Pieces::default(), 256), Ok(vec![]));
}

/// One word of a million letters costs about what short words do: every merge is local.
#[test]
fn one_endless_word() {
    let mut random: u32 = 7;
    let letters = (0..1_000_000).map(|_| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        char::from(b'a' + (random >> 30) as u8)
    });
    let texts = [letters.collect::<String>()];
    let merges = train(&counted(&texts, 1, 1), 2000).unwrap();
    assert_eq!(merges.len(), 2000 - 256);
    let encoder = encoder(merges);
    let ids = encoder.encode(&texts[0]).unwrap();
    assert_eq!(encoder.decode(&ids).unwrap(), texts[0].as_bytes());
}

#[test]
fn an_error_of_the_source_passes_through() {
    #[derive(Debug, PartialEq)]
    enum Mine {
        Read,
        Bpe(Error),
    }
    impl From<Error> for Mine {
        fn from(error: Error) -> Self {
            Self::Bpe(error)
        }
    }
    let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
    let mut batches = [Ok(Some(vec!["a".to_string()])), Err(Mine::Read)].into_iter();
    let result = count_pieces(&splitter, 3, || batches.next().unwrap());
    assert_eq!(result, Err(Mine::Read));

    // All workers fail while texts still come: the count ends, though the source does not.
    let splitter = Splitter::new(r"(?:(?=a)a*)*b(?<!x)c").unwrap();
    let result = count_pieces(&splitter, 2, || Ok::<_, Mine>(Some(vec!["a".repeat(200)])));
    assert!(
        matches!(result, Err(Mine::Bpe(Error::Pattern(_)))),
        "{result:?}"
    );
}

fn texts() -> impl Strategy<Value = Vec<String>> {
    // Few letters, so that runs, overlaps and ties are common.
    proptest::collection::vec("[abcé '1\n]{0,60}|(aab|aba|a){0,20}", 0..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    #[test]
    fn equals_the_naive_trainer(texts in texts(), extra in 0..60u32) {
        let expected = naive(&texts, 256 + extra);
        for (num_threads, batch) in [(1, 8), (4, 1)] {
            let merges = train(&counted(&texts, num_threads, batch), 256 + extra).unwrap();
            prop_assert_eq!(&merges, &expected);
        }
    }

    /// No two merges make the same bytes, so the ranks are a bijection, which tiktoken demands.
    #[test]
    fn tokens_are_unique(texts in texts()) {
        let encoder = encoder(train(&counted(&texts, 1, 8), 400).unwrap());
        let unique: HashSet<_> = encoder.tokens().iter().collect();
        prop_assert_eq!(unique.len(), encoder.tokens().len());
    }

    /// Encoding is the merges replayed in order, on text that was trained on and on other text.
    #[test]
    fn encodes_as_the_merges_replayed(texts in texts(), other in texts(), extra in 0..60u32) {
        let merges = train(&counted(&texts, 1, 8), 256 + extra).unwrap();
        let encoder = encoder(merges.clone());
        let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
        let all: Vec<&String> = texts.iter().chain(&other).collect();
        let batched = encoder.encode_batch(&all, 3).unwrap();
        for (text, ids) in all.into_iter().zip(batched) {
            let mut expected = Vec::new();
            splitter.for_each_piece(text, |piece| {
                let bytes: Vec<u32> = piece.bytes().map(u32::from).collect();
                let replay = |word: Vec<u32>, (pair, token): (&Pair, u32)| merged(&word, *pair, token);
                expected.extend(merges.iter().zip(256..).fold(bytes, replay));
            }).unwrap();
            prop_assert_eq!(&ids, &expected);
            prop_assert_eq!(encoder.decode(&ids).unwrap(), text.as_bytes());
        }
    }
}
