//! Finds the merges by repeatedly joining the most frequent pair of neighbours into a new token.
//!
//! Nothing is counted twice: every pair has its count and places, a merge visits the places of its
//! pair and corrects the neighbours' counts, and a heap gives the most frequent pair. Three facts
//! make this simple.
//!
//! - A pair that contains the newest token appears only in the round that makes this token. So its
//!   places are collected once, in the order of the text, and afterwards its count can only fall.
//! - So a heap entry is never too low; one that is too high is pushed again when popped.
//! - Both neighbours of a merge belong to such new pairs, so a round sums them in arrays indexed by
//!   the neighbour, and touches the table of pairs once per neighbour, not once per place.
//!
//! Of pairs with equal counts, the smaller pair of ids is merged first. Overlapping pairs all count
//! (`aaa` has two `aa`), but are merged from the left without overlap.
//!
//! Source: R. Sennrich, B. Haddow, A. Birch, Neural Machine Translation of Rare Words with Subword
//! Units, 2016, section 3.2.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::mem::take;

use rustc_hash::FxHashMap;

use crate::count::Pieces;
use crate::word::{Place, SEPARATOR, Words};
use crate::{Error, NUM_BYTES, Pair};

/// The first `num_merges` merges in order, the n-th of which makes token 256 + n; fewer if every
/// piece becomes one token before.
pub fn train(pieces: &Pieces, num_merges: usize) -> Result<Vec<Pair>, Error> {
    let mut trainer = Trainer::new(Words::new(pieces)?);
    let mut merges = Vec::new();
    while merges.len() < num_merges {
        let Some(pair) = trainer.most_frequent() else {
            break;
        };
        trainer.merge(pair);
        merges.push(pair);
    }
    Ok(merges)
}

/// The bytes of every token, in the order of the ids: the 256 bytes, then what `merges` make.
pub fn token_bytes(merges: &[Pair]) -> Vec<Vec<u8>> {
    let mut tokens: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
    for &(left, right) in merges {
        tokens.push([&*tokens[left as usize], &tokens[right as usize]].concat());
    }
    tokens
}

/// How often a pair or a neighbour occurs in the text, and where.
#[derive(Clone, Default)]
struct Occurrences {
    count: u64,
    places: Vec<Place>,
}

impl Occurrences {
    fn add(&mut self, count: u64, place: Place) {
        self.count += count;
        self.places.push(place);
    }
}

/// The tokens that stood on one side of the merges of a round.
#[derive(Default)]
struct Side {
    by_token: Vec<Occurrences>,
    seen: Vec<u32>,
}

impl Side {
    #[inline]
    fn add(&mut self, token: u32, count: u64, place: Place) {
        let occurrences = &mut self.by_token[token as usize];
        if occurrences.count == 0 {
            self.seen.push(token);
        }
        occurrences.add(count, place);
    }

    /// Empties this side: every token that was seen, with its occurrences.
    fn drain(&mut self) -> Vec<(u32, Occurrences)> {
        let occurrences = |token| (token, take(&mut self.by_token[token as usize]));
        self.seen.drain(..).map(occurrences).collect()
    }
}

struct Trainer {
    words: Words,
    pairs: FxHashMap<Pair, Occurrences>,
    heap: BinaryHeap<(u64, Reverse<Pair>)>,
    before: Side,
    after: Side,
}

impl Trainer {
    fn new(words: Words) -> Self {
        // Pairs of bytes fit an array, faster than the table for this pass over all places.
        let index = |(left, right): Pair| (left * NUM_BYTES + right) as usize;
        let mut by_pair = vec![Occurrences::default(); (NUM_BYTES * NUM_BYTES) as usize];
        words.for_each_pair(|pair, place| by_pair[index(pair)].add(words.count(place), place));

        let mut trainer = Self {
            words,
            pairs: FxHashMap::default(),
            heap: BinaryHeap::new(),
            before: Side::default(),
            after: Side::default(),
        };
        for (pair, occurrences) in (0..).zip(by_pair) {
            trainer.add_pair((pair / NUM_BYTES, pair % NUM_BYTES), occurrences);
        }
        trainer
    }

    fn add_pair(&mut self, pair: Pair, occurrences: Occurrences) {
        if occurrences.count > 0 {
            self.heap.push((occurrences.count, Reverse(pair)));
            self.pairs.insert(pair, occurrences);
        }
    }

    fn lower_count(&mut self, pair: Pair, count: u64) {
        // The pair that is being merged is gone from the table; it meets itself in `aaa`.
        if let Some(occurrences) = self.pairs.get_mut(&pair) {
            occurrences.count -= count;
            if occurrences.count == 0 {
                self.pairs.remove(&pair);
            }
        }
    }

    /// The pair of the highest count, the smaller one of several; `None` when no pair is left.
    fn most_frequent(&mut self) -> Option<Pair> {
        while let Some((count, Reverse(pair))) = self.heap.pop() {
            match self.pairs.get(&pair) {
                Some(occurrences) if occurrences.count == count => return Some(pair),
                Some(occurrences) => self.heap.push((occurrences.count, Reverse(pair))),
                None => {}
            }
        }
        None
    }

    /// Joins `pair` everywhere and brings the counts of all pairs up to date.
    fn merge(&mut self, pair: Pair) {
        let (left, right) = pair;
        let token = self.words.add_token(pair);
        for side in [&mut self.before, &mut self.after] {
            let num_tokens = token as usize + 1;
            side.by_token.resize_with(num_tokens, Occurrences::default);
        }
        let places = self.pairs.remove(&pair).unwrap_or_default().places;
        for place in places {
            let Some((before, after)) = self.words.merge(place, pair, token) else {
                continue;
            };
            let count = self.words.count(place);
            if before != SEPARATOR {
                let place_before = self.words.place_before(place, before);
                self.before.add(before, count, place_before);
            }
            if after != SEPARATOR {
                self.after.add(after, count, place);
            }
        }

        for (neighbour, occurrences) in self.after.drain() {
            self.lower_count((right, neighbour), occurrences.count);
            self.add_pair((token, neighbour), occurrences);
        }
        // In this order: of two new tokens side by side, the first was added with the left token of
        // the second as its neighbour, a moment before that was merged itself.
        for (neighbour, occurrences) in self.before.drain() {
            self.lower_count((neighbour, left), occurrences.count);
            self.add_pair((neighbour, token), occurrences);
        }
    }
}
