//! The trainer against a naive one, which counts all pairs anew for every merge.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

use proptest::prelude::*;
use rustbpe::count::{Pieces, count_pieces};
use rustbpe::split::{DEFAULT_PATTERN, Splitter};
use rustbpe::train::{token_bytes, train};
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
fn naive(texts: &[String], num_merges: u32) -> Vec<Pair> {
    let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
    let mut words: Vec<Vec<u32>> = Vec::new();
    for text in texts {
        let word = |piece: &str| piece.bytes().map(u32::from).collect();
        splitter
            .for_each_piece(text, |piece| words.push(word(piece)))
            .unwrap();
    }
    let mut merges = Vec::new();
    for token in 256..256 + num_merges {
        let mut counts: HashMap<Pair, u64> = HashMap::new();
        for pair in words.iter().flat_map(|word| word.windows(2)) {
            *counts.entry((pair[0], pair[1])).or_default() += 1;
        }
        // The largest count; of those, the smallest pair.
        let Some((_, Reverse(pair))) = counts.iter().map(|(&p, &n)| (n, Reverse(p))).max() else {
            break;
        };
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

#[test]
fn equal_counts_take_the_smaller_pair() {
    let texts = ["zz bd ac".to_string()];
    // " a", " b" and "ac", "bd", "zz" occur once each; a space is the smallest byte.
    let merges = train(&counted(&texts, 1, 1), 3).unwrap();
    assert_eq!(merges, [(32, 97), (32, 98), (122, 122)]);
}

#[test]
fn repeated_letters_merge_from_the_left() {
    let texts = ["aaaaaaa".to_string()];
    // aa aa aa a; aaaa aa a; aaaa aaa, the smaller of two pairs that occur once; the whole
    let merges = train(&counted(&texts, 1, 1), 1000).unwrap();
    assert_eq!(merges, [(97, 97), (256, 256), (256, 97), (257, 258)]);
    assert_eq!(token_bytes(&merges).last().unwrap(), b"aaaaaaa");
}

#[test]
fn no_text_no_merges() {
    assert_eq!(train(&Pieces::default(), 10), Ok(vec![]));
}

/// One word of a million letters takes about as long as short words do: every merge is local.
#[test]
fn one_endless_word() {
    let mut random: u32 = 7;
    let letters = (0..1_000_000).map(|_| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        char::from(b'a' + (random >> 30) as u8)
    });
    let word: String = letters.collect();
    let beginning = [word[..20_000].to_string()];
    let merges = train(&counted(&beginning, 1, 1), 50).unwrap();
    assert_eq!(merges, naive(&beginning, 50));
    let merges = train(&counted(&[word], 1, 1), 2000).unwrap();
    assert_eq!(merges.len(), 2000);
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
    #![proptest_config(ProptestConfig {
        cases: 300, failure_persistence: None, ..Default::default()
    })]

    #[test]
    fn equals_the_naive_trainer(texts in texts(), num_merges in 0..60u32) {
        let expected = naive(&texts, num_merges);
        for (num_threads, batch) in [(1, 8), (4, 1)] {
            let merges = train(&counted(&texts, num_threads, batch), num_merges as usize).unwrap();
            prop_assert_eq!(&merges, &expected);
        }
    }

    /// No two merges make the same bytes, so the ranks are a bijection, which tiktoken demands:
    /// whatever stands between two token boundaries is merged as it would be alone, so bytes that
    /// have a token never again stand there as two.
    #[test]
    fn tokens_are_unique(texts in texts()) {
        let tokens = token_bytes(&train(&counted(&texts, 1, 8), 150).unwrap());
        let unique: HashSet<_> = tokens.iter().collect();
        prop_assert_eq!(unique.len(), tokens.len());
    }
}
