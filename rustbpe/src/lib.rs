//! Trains a byte-level byte pair encoding (BPE).
//!
//! A text goes through the modules in this order:
//!
//! 1. [`split`] cuts it into pieces (words, numbers, punctuation, white space); no token crosses
//!    from one piece into the next.
//! 2. [`count`] counts the unique pieces on several threads. The text itself is no longer needed.
//! 3. `word` lays the unique pieces end to end as token ids, at first one per byte.
//! 4. [`train`] repeatedly joins the most frequent pair of neighbours into a new token.
//!
//! ```
//! use rustbpe::{count::count_pieces, split::{DEFAULT_PATTERN, Splitter}, train};
//!
//! let splitter = Splitter::new(DEFAULT_PATTERN)?;
//! let mut batches = [vec!["low lower lowest".to_string()]].into_iter();
//! let pieces = count_pieces(&splitter, 2, || Ok::<_, rustbpe::Error>(batches.next()))?;
//! let merges = train::train(&pieces, 2)?;
//! assert_eq!(merges, [(b'l'.into(), b'o'.into()), (256, b'w'.into())]); // "lo", "low"
//! assert_eq!(train::token_bytes(&merges)[257], b"low");
//! # Ok::<(), rustbpe::Error>(())
//! ```
//!
//! The merges depend only on the text, the pattern and their number: of pairs with equal counts the
//! smaller is merged first, so neither threads nor the order of a hash map matters.

#![deny(missing_docs)]
#![cfg_attr(not(feature = "python"), forbid(unsafe_code))]

pub mod count;
#[cfg(feature = "python")]
mod python;
pub mod split;
pub mod train;
mod word;

use std::fmt;

/// Tokens 0 to 255 are the single bytes; merged tokens follow.
pub const NUM_BYTES: u32 = 256;

/// The ids of two adjacent tokens.
pub type Pair = (u32, u32);

/// What a caller can cause.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The split pattern does not compile, or gave up on a text.
    Pattern(String),
    /// The unique pieces are longer in all than 32 bits can index.
    TooLong,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pattern(reason) => write!(f, "split pattern: {reason}"),
            Self::TooLong => write!(f, "the unique pieces of the text exceed 4 GiB"),
        }
    }
}

impl std::error::Error for Error {}
