//! Trains a byte-level byte pair encoding (BPE), and encodes with it.
//!
//! The way of a text through the modules, in order:
//!
//! 1. [`split`] cuts it into pieces (words, numbers, punctuation, white space); no token crosses a piece.
//! 2. [`count`] counts the unique pieces on several threads. From here on the text itself is not needed,
//!    so memory is bounded by the unique pieces.
//! 3. [`word`] lays the unique pieces end to end as token ids, bytes at first.
//! 4. [`train`] joins the most frequent pair of neighbouring tokens into a new token, again and again.
//! 5. [`encode`] replays the merges on new text.
//!
//! ```
//! use rustbpe::{count, encode::Encoder, split::{DEFAULT_PATTERN, Splitter}, train};
//!
//! let splitter = Splitter::new(DEFAULT_PATTERN)?;
//! let mut batches = [vec!["low lower lowest".to_string()]].into_iter();
//! let pieces = count::count_pieces(&splitter, 2, || Ok::<_, rustbpe::Error>(batches.next()))?;
//! let merges = train::train(&pieces, 258)?;
//! assert_eq!(merges, [(b'l'.into(), b'o'.into()), (256, b'w'.into())]); // "lo", "low"
//! assert_eq!(Encoder::new(splitter, merges).encode("low")?, [257]);
//! # Ok::<(), rustbpe::Error>(())
//! ```
//!
//! Merges depend on the text, the pattern and the vocabulary size alone: pairs of equal count are merged in
//! the order of their ids, so neither the number of threads nor the order of a hash map can show.

#![deny(missing_docs)]
#![cfg_attr(not(feature = "python"), forbid(unsafe_code))]

pub mod count;
pub mod encode;
#[cfg(feature = "python")]
mod python;
pub mod split;
pub mod train;
pub mod word;

use std::fmt;

/// Tokens 0 to 255 are the single bytes; merged tokens follow.
pub const NUM_BYTES: u32 = 256;

/// The environment variable that sets the number of threads; without it every core is used.
pub const THREADS_VARIABLE: &str = "RUSTBPE_NUM_THREADS";

/// Two token ids that stand side by side.
pub type Pair = (u32, u32);

/// What a caller can cause.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The vocabulary cannot hold the 256 single bytes.
    VocabSize(i64),
    /// The buffer cannot hold one text.
    BufferSize,
    /// The split pattern does not compile, or gave up on a text.
    Pattern(String),
    /// There was no text to train on, or the pattern matches nothing in it.
    NoText,
    /// The unique pieces are longer in all than 32 bits can index.
    TooLong,
    /// `RUSTBPE_NUM_THREADS` is not a number above 0.
    Threads(String),
    /// An id that no token has.
    Token(i64),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VocabSize(size) => write!(
                f,
                "vocab_size must be at least {NUM_BYTES}, one token per byte; it is {size}"
            ),
            Self::BufferSize => write!(f, "buffer_size must be at least 1"),
            Self::Pattern(reason) => write!(f, "split pattern: {reason}"),
            Self::NoText => write!(
                f,
                "there is nothing to train on: no text, or none that the pattern matches"
            ),
            Self::TooLong => write!(f, "the unique pieces of the text exceed 4 GiB"),
            Self::Threads(value) => write!(
                f,
                "{THREADS_VARIABLE} must be a whole number above 0; it is {value:?}"
            ),
            Self::Token(id) => write!(f, "token id {id} is not in the vocabulary"),
        }
    }
}

impl std::error::Error for Error {}

/// The number of threads to use: `RUSTBPE_NUM_THREADS` where it is set, else the number of cores.
pub fn num_threads() -> Result<usize, Error> {
    match std::env::var(THREADS_VARIABLE) {
        Ok(value) => match value.parse() {
            Ok(threads) if threads > 0 => Ok(threads),
            _ => Err(Error::Threads(value)),
        },
        Err(_) => Ok(std::thread::available_parallelism().map_or(1, usize::from)),
    }
}
