//! The Python module: training with the GIL released, and errors as Python exceptions.
//!
//! A bad argument is a `ValueError`, an item that is not a string a `TypeError`; what the iterator
//! raises passes through.

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyIterator, PyString};

use crate::Error;
use crate::count::count_pieces;
use crate::split::{DEFAULT_PATTERN, Splitter};
use crate::train::{token_bytes, train};

/// Bytes of text, about, that a counting thread gets at a time; with more, threads finish unevenly.
const BATCH_BYTES: usize = 1 << 20;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

/// The bytes of every token, in the order of the ids: the 256 bytes, then what the merges make.
///
/// Trains on all cores; with too little text there are fewer than `num_merges`.
#[pyfunction(name = "train")]
fn train_texts<'py>(
    texts: &Bound<'py, PyAny>,
    num_merges: usize,
    pattern: &str,
) -> PyResult<Vec<Bound<'py, PyBytes>>> {
    let splitter = Splitter::new(pattern)?;
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let py = texts.py();
    let iterator = texts.try_iter()?.unbind();
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
        Ok(train(&pieces, num_merges)?)
    })?;
    let tokens = token_bytes(&merges);
    Ok(tokens.iter().map(|bytes| PyBytes::new(py, bytes)).collect())
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
    module.add("DEFAULT_PATTERN", DEFAULT_PATTERN)?;
    module.add_function(wrap_pyfunction!(train_texts, module)?)
}
