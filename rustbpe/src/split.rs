//! Cuts a text into the pieces that no token crosses.
//!
//! [`DEFAULT_PATTERN`] is matched by a hand-written scanner, every other pattern by fancy-regex.
//! The engine splits at 14 MB/s, which would take nearly all of a training run. The scanner reads
//! Unicode classes from the engine's tables, so the two agree on all Unicode versions; the tests
//! compare them.

use std::sync::LazyLock;

use regex_syntax::hir::{self, HirKind};

use crate::Error;

/// The GPT-4 split pattern, with numbers cut to at most two digits.
///
/// Its branches in order: the ending of a contraction; letters, with one character before them that
/// is no letter, digit or line end; one or two digits; punctuation, with a space before and line
/// ends after; white space up to the last line end of its run; white space except the last
/// character before a word; other white space.
pub const DEFAULT_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
);

/// Splits by one pattern. Cheap to clone; give each thread its own, as the engine locks its caches.
#[derive(Clone, Debug)]
pub enum Splitter {
    /// The default pattern, by the scanner.
    Scanner,
    /// Any pattern, by the engine.
    Regex(Box<fancy_regex::Regex>),
}

impl Splitter {
    /// The fastest splitter for `pattern`.
    pub fn new(pattern: &str) -> Result<Self, Error> {
        if pattern == DEFAULT_PATTERN {
            return Ok(Self::Scanner);
        }
        let regex = fancy_regex::Regex::new(pattern).map_err(bad_pattern)?;
        Ok(Self::Regex(Box::new(regex)))
    }

    /// Calls `each` on the pieces of `text` in order. What the pattern does not match belongs to no
    /// piece, as in tiktoken; the default pattern matches everything.
    pub fn for_each_piece<'t>(
        &self,
        text: &'t str,
        mut each: impl FnMut(&'t str),
    ) -> Result<(), Error> {
        match self {
            Self::Scanner => {
                let scanner = Scanner {
                    text,
                    classes: &CLASSES,
                };
                let mut start = 0;
                while start < text.len() {
                    let end = scanner.piece_end(start);
                    each(&text[start..end]);
                    start = end;
                }
            }
            Self::Regex(regex) => {
                for found in regex.find_iter(text) {
                    let piece = found.map_err(bad_pattern)?.as_str();
                    if !piece.is_empty() {
                        each(piece);
                    }
                }
            }
        }
        Ok(())
    }
}

fn bad_pattern(error: fancy_regex::Error) -> Error {
    Error::Pattern(error.to_string())
}

/// What the default pattern tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Class {
    Symbol,
    Letter,
    Number,
    Space,
    LineEnd,
    EndOfText,
}

/// The class of every character, 1.1 MB, of which a text touches only its own scripts.
static CLASSES: LazyLock<Vec<Class>> = LazyLock::new(|| {
    let mut classes = vec![Class::Symbol; char::MAX as usize + 1];
    for (pattern, class) in [
        (r"\p{L}", Class::Letter),
        (r"\p{N}", Class::Number),
        (r"\s", Class::Space),
        (r"[\r\n]", Class::LineEnd),
    ] {
        let parsed = regex_syntax::parse(pattern).expect("a class of regex-syntax");
        let HirKind::Class(hir::Class::Unicode(set)) = parsed.kind() else {
            unreachable!("{pattern} is a Unicode class");
        };
        for range in set.ranges() {
            classes[range.start() as usize..=range.end() as usize].fill(class);
        }
    }
    classes
});

/// Walks one text by the default pattern.
struct Scanner<'t> {
    text: &'t str,
    classes: &'static [Class],
}

impl Scanner<'_> {
    /// Where the piece that starts at byte `start` ends. The branches are those of the pattern, in
    /// its order, sorted by the class of the first character.
    #[inline]
    fn piece_end(&self, start: usize) -> usize {
        let (class, next) = self.step(start);
        match class {
            Class::Letter => self.run_end(next, Class::Letter),
            Class::Number => match self.step(next) {
                (Class::Number, second) => second,
                _ => next,
            },
            Class::Symbol => {
                if let Some(end) = self.contraction_end(start) {
                    end
                } else if self.step(next).0 == Class::Letter {
                    self.run_end(next, Class::Letter)
                } else {
                    self.symbols_end(next)
                }
            }
            Class::Space => match self.step(next).0 {
                Class::Letter => self.run_end(next, Class::Letter),
                Class::Symbol if self.byte(start) == b' ' => self.symbols_end(next),
                _ => self.white_space_end(start),
            },
            Class::LineEnd | Class::EndOfText => self.white_space_end(start),
        }
    }

    /// The class of the character at byte `at`, and where the next one starts.
    #[inline]
    fn step(&self, at: usize) -> (Class, usize) {
        match self.text.as_bytes().get(at) {
            None => (Class::EndOfText, at),
            Some(&byte) if byte < 0x80 => (self.classes[byte as usize], at + 1),
            Some(_) => {
                let character = self.text[at..].chars().next().unwrap_or_default();
                (self.classes[character as usize], at + character.len_utf8())
            }
        }
    }

    /// The byte at `at`, or 0 past the end.
    #[inline]
    fn byte(&self, at: usize) -> u8 {
        self.text.as_bytes().get(at).copied().unwrap_or(0)
    }

    /// Where the run of `class` that `at` stands in ends; `at` itself if it stands in none.
    #[inline]
    fn run_end(&self, mut at: usize, class: Class) -> usize {
        loop {
            match self.step(at) {
                (found, next) if found == class => at = next,
                _ => return at,
            }
        }
    }

    /// The end of punctuation and of the line ends after it.
    #[inline]
    fn symbols_end(&self, at: usize) -> usize {
        self.run_end(self.run_end(at, Class::Symbol), Class::LineEnd)
    }

    /// The end of 's, 'd, 'm, 't, 'll, 've or 're in any case, if one starts here.
    #[inline]
    fn contraction_end(&self, start: usize) -> Option<usize> {
        if self.byte(start) != b'\'' {
            return None;
        }
        let letter = |index: usize| self.byte(start + index).to_ascii_lowercase();
        match (letter(1), letter(2)) {
            (b's' | b'd' | b'm' | b't', _) => Some(start + 2),
            (b'l', b'l') | (b'v' | b'r', b'e') => Some(start + 3),
            (0xC5, 0xBF) => Some(start + 3), // U+017F, the long s, which Unicode folds to s
            _ => None,
        }
    }

    /// The end of a piece of white space whose first character belongs to no word or punctuation.
    fn white_space_end(&self, start: usize) -> usize {
        let (mut at, mut last, mut line_end) = (start, start, None);
        loop {
            let (class, next) = self.step(at);
            match class {
                Class::LineEnd => line_end = Some(next),
                Class::Space => {}
                _ => break,
            }
            (last, at) = (at, next);
        }
        match line_end {
            Some(end) => end,
            // The last character is left to the word that follows, unless it is the only one.
            None if at < self.text.len() && last > start => last,
            None => at,
        }
    }
}
