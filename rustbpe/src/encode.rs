//! Encodes text with trained merges, and decodes ids.
//!
//! A piece that is a token as a whole, as most are, costs one look-up. In any other the lowest merge is
//! applied first, the leftmost of equal ones, with a heap over a linked list: a piece of a million bytes
//! takes n log n steps. The ids are those of tiktoken with the same ranks.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::thread;

use rustc_hash::FxHashMap;

use crate::split::{DEFAULT_PATTERN, Splitter};
use crate::{Error, NUM_BYTES, Pair};

/// A trained vocabulary.
#[derive(Debug)]
pub struct Encoder {
    splitter: Splitter,
    merges: FxHashMap<Pair, u32>,
    tokens: Vec<Box<[u8]>>,
    ids: FxHashMap<Box<[u8]>, u32>,
}

impl Default for Encoder {
    /// The vocabulary before any training: the 256 bytes, and the default pattern.
    fn default() -> Self {
        let splitter = Splitter::new(DEFAULT_PATTERN).expect("the scanner needs no compiling");
        Self::new(splitter, Vec::new())
    }
}

impl Encoder {
    /// The vocabulary of `merges`, which are in the order of their ids, the first being 256.
    pub fn new(splitter: Splitter, merges: Vec<Pair>) -> Self {
        let mut tokens: Vec<Box<[u8]>> = (0..=u8::MAX).map(|byte| Box::from([byte])).collect();
        for &(left, right) in &merges {
            tokens.push(
                [&*tokens[left as usize], &*tokens[right as usize]]
                    .concat()
                    .into(),
            );
        }
        Self {
            splitter,
            merges: merges.into_iter().zip(NUM_BYTES..).collect(),
            ids: tokens.iter().cloned().zip(0..).collect(),
            tokens,
        }
    }

    /// The split pattern.
    pub fn pattern(&self) -> &str {
        self.splitter.pattern()
    }

    /// The bytes of every token, in the order of the ids.
    pub fn tokens(&self) -> &[Box<[u8]>] {
        &self.tokens
    }

    /// The ids of `text`.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encode_with(&self.splitter, text)
    }

    /// The ids of each text, in order, encoded on `num_threads` threads.
    pub fn encode_batch<T: AsRef<str> + Sync>(
        &self,
        texts: &[T],
        num_threads: usize,
    ) -> Result<Vec<Vec<u32>>, Error> {
        let chunk = texts.len().div_ceil(num_threads).max(1);
        thread::scope(|scope| {
            let workers: Vec<_> = texts
                .chunks(chunk)
                .map(|texts| {
                    let splitter = self.splitter.clone();
                    scope.spawn(move || -> Result<Vec<_>, Error> {
                        let encode = |text: &T| self.encode_with(&splitter, text.as_ref());
                        texts.iter().map(encode).collect()
                    })
                })
                .collect();
            let mut all = Vec::with_capacity(texts.len());
            for worker in workers {
                all.extend(worker.join().expect("an encoding thread panicked")?);
            }
            Ok(all)
        })
    }

    /// The bytes that `ids` stand for.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        for &id in ids {
            let token = self
                .tokens
                .get(id as usize)
                .ok_or(Error::Token(id.into()))?;
            bytes.extend_from_slice(token);
        }
        Ok(bytes)
    }

    fn encode_with(&self, splitter: &Splitter, text: &str) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::new();
        splitter.for_each_piece(text, |piece| match self.ids.get(piece.as_bytes()) {
            Some(&id) => ids.push(id),
            None => self.merge_piece(piece.as_bytes(), &mut ids),
        })?;
        Ok(ids)
    }

    /// Appends the ids of a piece that is no token.
    fn merge_piece(&self, piece: &[u8], ids: &mut Vec<u32>) {
        let mut list = List::new(piece);
        let mut heap = BinaryHeap::new();
        let push = |heap: &mut BinaryHeap<_>, list: &List, at: usize| {
            if let Some(token) = list.pair(at).and_then(|pair| self.merges.get(&pair)) {
                heap.push(Reverse((*token, at)));
            }
        };
        for at in 0..piece.len() {
            push(&mut heap, &list, at);
        }
        while let Some(Reverse((token, at))) = heap.pop() {
            // An entry is stale if a neighbour was merged since; its pair then makes another token, or none.
            if list.pair(at).and_then(|pair| self.merges.get(&pair)) != Some(&token) {
                continue;
            }
            list.join(at, token);
            push(&mut heap, &list, at);
            if let Some(before) = list.before(at) {
                push(&mut heap, &list, before);
            }
        }
        ids.extend(list.ids());
    }
}

/// The tokens of one piece as a doubly linked list over the bytes at which they start.
struct List {
    tokens: Vec<Option<u32>>, // None where no token starts any more
    previous: Vec<usize>,
    next: Vec<usize>,
}

impl List {
    fn new(piece: &[u8]) -> Self {
        Self {
            tokens: piece.iter().map(|&byte| Some(byte.into())).collect(),
            previous: (0..piece.len()).map(|at| at.saturating_sub(1)).collect(),
            next: (1..=piece.len()).collect(),
        }
    }

    /// The token at `at` and the one after it, if both are there.
    fn pair(&self, at: usize) -> Option<Pair> {
        let left = self.tokens[at]?;
        let right = *self.tokens.get(self.next[at])?;
        Some((left, right?))
    }

    fn before(&self, at: usize) -> Option<usize> {
        (at > 0).then(|| self.previous[at])
    }

    /// Replaces the token at `at` and the next one by `token`.
    fn join(&mut self, at: usize, token: u32) {
        let gone = self.next[at];
        self.tokens[at] = Some(token);
        self.tokens[gone] = None;
        self.next[at] = self.next[gone];
        if let Some(previous) = self.previous.get_mut(self.next[at]) {
            *previous = at;
        }
    }

    fn ids(&self) -> impl Iterator<Item = u32> {
        self.tokens.iter().copied().flatten()
    }
}
