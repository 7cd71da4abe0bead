//! The Python module: the same functions, with errors as Python exceptions and the GIL released around work.
//!
//! A caller's mistake is a `ValueError`, an item that is no text a `TypeError`, and what the iterator raises
//! passes through as it is.

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyIterator, PyString};

use crate::count::count_pieces;
use crate::encode::Encoder;
use crate::split::{DEFAULT_PATTERN, Splitter};
use crate::{Error, NUM_BYTES, num_threads, train};

/// Texts are handed to the counting threads in batches of at most about so many bytes. Larger ones only make
/// the threads wait for each other at the end.
const BATCH_BYTES: usize = 1 << 20;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

/// A byte-level BPE tokenizer; before training, its vocabulary is the 256 bytes.
#[pyclass(module = "rustbpe")]
#[derive(Default)]
struct Tokenizer {
    encoder: Encoder,
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Train on the texts of an iterator. Deterministic: of equally frequent pairs the smaller is merged
    /// first, whatever the number of threads (RUSTBPE_NUM_THREADS, else all cores).
    ///
    /// At most `buffer_size` texts are handed to a thread at a time. With too little text, `vocab_size`
    /// stays smaller than asked for. A failed training leaves the tokenizer as it was.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None))]
    fn train_from_iterator(
        &mut self,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        buffer_size: usize,
        pattern: Option<&str>,
    ) -> PyResult<()> {
        if vocab_size < NUM_BYTES.into() {
            return Err(Error::VocabSize(vocab_size).into());
        }
        if buffer_size == 0 {
            return Err(Error::BufferSize.into());
        }
        let vocab_size = u32::try_from(vocab_size).unwrap_or(u32::MAX);
        let splitter = Splitter::new(pattern.unwrap_or(DEFAULT_PATTERN))?;
        let threads = num_threads()?;
        let py = iterator.py();
        let iterator = iterator.try_iter()?.unbind();
        let mut num_texts = 0;
        let merges = py.detach(|| {
            let pieces = count_pieces(&splitter, threads, || {
                Python::attach(|py| next_batch(iterator.bind(py), buffer_size, &mut num_texts))
            })?;
            if pieces.is_empty() {
                return Err(Error::NoText.into());
            }
            Ok::<_, PyErr>(train::train(&pieces, vocab_size)?)
        })?;
        self.encoder = Encoder::new(splitter, merges);
        Ok(())
    }

    /// The split pattern.
    fn get_pattern(&self) -> &str {
        self.encoder.pattern()
    }

    /// (bytes, rank) of every token in the order of the ranks, which are the ids: what tiktoken takes.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        let tokens = self.encoder.tokens().iter();
        tokens
            .map(|bytes| PyBytes::new(py, bytes))
            .zip(0..)
            .collect()
    }

    /// The number of tokens, the 256 bytes included.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.encoder.tokens().len()
    }

    /// The ids of one text.
    fn encode(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        Ok(py.detach(|| self.encoder.encode(text))?)
    }

    /// The ids of each text, encoded on several threads.
    fn batch_encode(&self, py: Python<'_>, texts: Vec<PyBackedStr>) -> PyResult<Vec<Vec<u32>>> {
        let threads = num_threads()?;
        Ok(py.detach(|| self.encoder.encode_batch(&texts, threads))?)
    }

    /// The text of some ids; bytes that are no UTF-8 become U+FFFD. An unknown id is a ValueError.
    fn decode(&self, ids: Vec<i64>) -> PyResult<String> {
        let id = |id| u32::try_from(id).map_err(|_| Error::Token(id));
        let ids: Vec<u32> = ids.into_iter().map(id).collect::<Result<_, _>>()?;
        Ok(String::from_utf8_lossy(&self.encoder.decode(&ids)?).into_owned())
    }
}

/// The next texts of the iterator, at most `buffer_size` or about `BATCH_BYTES`; `None` at its end.
fn next_batch(
    iterator: &Bound<'_, PyIterator>,
    buffer_size: usize,
    num_texts: &mut usize,
) -> PyResult<Option<Vec<String>>> {
    iterator.py().check_signals()?; // Ctrl-C, even if the iterator runs no Python code
    let (mut batch, mut num_bytes) = (Vec::new(), 0);
    let mut texts = iterator.clone();
    while batch.len() < buffer_size && num_bytes < BATCH_BYTES {
        let Some(item) = texts.next().transpose()? else {
            break;
        };
        let Ok(text) = item.cast::<PyString>() else {
            let kind = item.get_type().name()?;
            let message = format!("text {num_texts} of the iterator must be a str, not {kind}");
            return Err(PyTypeError::new_err(message));
        };
        *num_texts += 1;
        num_bytes += text.to_str()?.len();
        batch.push(text.to_str()?.to_string());
    }
    Ok((!batch.is_empty()).then_some(batch))
}

/// The module's initialisation.
#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()
}
