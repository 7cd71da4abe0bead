//! The unique pieces laid end to end in one array of token ids, in which neighbours merge in place.
//!
//! Each token covers as many cells as it has bytes and writes its id into the first and the last of
//! them. So both its neighbours are found in one step, without links: the next token starts where
//! this one ends, and the cell before this one is the last of the previous. (Allocators call this
//! trick boundary tags: Knuth, The Art of Computer Programming 1, 2.5.) A merge costs the same in a
//! piece of a million bytes as in a short word.
//!
//! ```text
//! separator  h  e  l  l  o  separator        five tokens of one byte
//! separator  h  ell ... ell  o  separator    after (e, l), (el, l): "ell" covers three cells
//! ```

use crate::count::Pieces;
use crate::{Error, NUM_BYTES, Pair};

/// Stands between two words, in the place of a neighbour.
pub const SEPARATOR: u32 = u32::MAX;

/// Fills the inner cells of a token, so that no place that once started there is taken for a token.
const INNER: u32 = u32::MAX - 1;

/// Where a token starts, and the word it belongs to.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    cell: u32, // the token's first
    word: u32, // index of the word, for its count
}

/// All words of a text, each once.
pub struct Words {
    cells: Vec<u32>,
    counts: Vec<u64>,        // of the words
    token_lengths: Vec<u32>, // in bytes
}

impl Words {
    /// The pieces as bytes. Pieces of one byte are left out: they hold no pair.
    pub fn new(pieces: &Pieces) -> Result<Self, Error> {
        let long = || pieces.iter().filter(|(piece, _)| piece.len() > 1);
        let num_cells = 1 + long().map(|(piece, _)| piece.len() + 1).sum::<usize>();
        if num_cells >= INNER as usize {
            return Err(Error::TooLong);
        }
        let mut cells = Vec::with_capacity(num_cells);
        cells.push(SEPARATOR);
        for (piece, _) in long() {
            cells.extend(piece.bytes().map(u32::from));
            cells.push(SEPARATOR);
        }
        Ok(Self {
            cells,
            counts: long().map(|(_, &count)| count).collect(),
            token_lengths: vec![1; NUM_BYTES as usize],
        })
    }

    /// How often the word of `place` occurs in the text.
    pub fn count(&self, place: Place) -> u64 {
        self.counts[place.word as usize]
    }

    /// The place of the token `before` that ends where the token at `place` starts.
    pub fn place_before(&self, place: Place, before: u32) -> Place {
        let cell = place.cell - self.token_lengths[before as usize];
        Place { cell, ..place }
    }

    /// Calls `each` on every pair of neighbours and its place; only before the first merge.
    pub fn for_each_pair(&self, mut each: impl FnMut(Pair, Place)) {
        let mut word = 0;
        for (cell, pair) in self.cells.windows(2).enumerate().skip(1) {
            match (pair[0], pair[1]) {
                (SEPARATOR, _) => word += 1,
                (_, SEPARATOR) => {}
                (left, right) => {
                    let cell = cell as u32;
                    each((left, right), Place { cell, word });
                }
            }
        }
    }

    /// Adds the token that joins `pair`, and returns its id.
    pub fn add_token(&mut self, (left, right): Pair) -> u32 {
        let length = self.token_lengths[left as usize] + self.token_lengths[right as usize];
        self.token_lengths.push(length);
        self.token_lengths.len() as u32 - 1
    }

    /// Puts `token` where `pair` stands at `place`, and returns its two neighbours ([`SEPARATOR`]
    /// at the ends of the word); `None` if the pair is no longer there.
    ///
    /// A place is only asked for a pair that once stood there, and a token never comes apart, so if
    /// the cell holds the id of the left token, this token still starts there.
    pub fn merge(&mut self, place: Place, (left, right): Pair, token: u32) -> Option<Pair> {
        let start = place.cell as usize;
        if self.cells[start] != left {
            return None;
        }
        let middle = start + self.token_lengths[left as usize] as usize;
        if self.cells[middle] != right {
            return None;
        }
        let end = middle + self.token_lengths[right as usize] as usize;
        self.cells[middle - 1] = INNER;
        self.cells[middle] = INNER;
        self.cells[start] = token;
        self.cells[end - 1] = token;
        Some((self.cells[start - 1], self.cells[end]))
    }
}
