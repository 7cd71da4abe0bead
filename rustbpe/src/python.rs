//! The Python module: training with the GIL released, and errors as Python exceptions.
//!
//! A bad argument is a `ValueError`, an item that is not a string a `TypeError`; what the iterator
//! raises passes through.

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyIterator, PyString};

use crate::count::count_pieces;
use crate::split::{DEFAULT_PATTERN, Splitter};
use crate::train::{token_bytes, train};
use crate::{Error, NUM_BYTES};

/// Bytes of text, about, that a counting thread gets at a time; with more, threads finish unevenly.
const BATCH_BYTES: usize = 1 << 20;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

/// Trains a byte-level BPE vocabulary; before training, it holds the 256 bytes.
#[pyclass(module = "rustbpe")]
struct Tokenizer {
    pattern: String,
    tokens: Vec<Vec<u8>>,
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> Self {
        Self {
            pattern: DEFAULT_PATTERN.to_string(),
            tokens: token_bytes(&[]),
        }
    }

    /// Train on an iterator of texts, on all cores.
    ///
    /// With too little text the vocabulary stays smaller than `vocab_size`. If training fails, the
    /// tokenizer is unchanged.
    #[pyo3(signature = (iterator, vocab_size, pattern=None))]
    fn train_from_iterator(
        &mut self,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        pattern: Option<&str>,
    ) -> PyResult<()> {
        if vocab_size < NUM_BYTES.into() {
            return Err(PyValueError::new_err(format!(
                "vocab_size must be at least {NUM_BYTES}, one token per byte; it is {vocab_size}"
            )));
        }
        let pattern = pattern.unwrap_or(DEFAULT_PATTERN);
        let splitter = Splitter::new(pattern)?;
        let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
        let py = iterator.py();
        let iterator = iterator.try_iter()?.unbind();
        let mut num_texts = 0;
        let merges = py.detach(|| {
            let pieces = count_pieces(&splitter, num_threads, || {
                Python::attach(|py| next_batch(iterator.bind(py), &mut num_texts))
            })?;
            if pieces.is_empty() {
                return Err(PyValueError::new_err(
                    "there is nothing to train on: no text, or none that the pattern matches",
                ));
            }
            Ok(train(&pieces, vocab_size as usize - NUM_BYTES as usize)?)
        })?;
        self.pattern = pattern.to_string();
        self.tokens = token_bytes(&merges);
        Ok(())
    }

    /// The split pattern.
    fn get_pattern(&self) -> &str {
        &self.pattern
    }

    /// (bytes, rank) of every token, in the order of the ranks, which are the ids.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        let tokens = self.tokens.iter().map(|bytes| PyBytes::new(py, bytes));
        tokens.zip(0..).collect()
    }
}

/// The next texts of the iterator, about `BATCH_BYTES` of them; `None` at its end.
fn next_batch(
    iterator: &Bound<'_, PyIterator>,
    num_texts: &mut usize,
) -> PyResult<Option<Vec<String>>> {
    iterator.py().check_signals()?; // Ctrl-C, even if the iterator runs no Python code
    let (mut batch, mut num_bytes) = (Vec::new(), 0);
    let mut texts = iterator.clone();
    while num_bytes < BATCH_BYTES {
        let Some(item) = texts.next().transpose()? else {
            break;
        };
        let Ok(text) = item.cast::<PyString>() else {
            return Err(PyTypeError::new_err(format!(
                "text {num_texts} of the iterator must be a str, not {}",
                item.get_type().name()?
            )));
        };
        *num_texts += 1;
        batch.push(text.to_str()?.to_string());
        num_bytes += text.to_str()?.len() + size_of::<String>(); // empty texts take memory, too
    }
    Ok((!batch.is_empty()).then_some(batch))
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()
}
