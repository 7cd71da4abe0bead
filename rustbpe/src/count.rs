//! Counts the unique pieces of a stream of texts on several threads.
//!
//! The calling thread pulls batches of texts; worker threads split and count them into separate
//! tables, which are added up at the end. The queue is short, so memory is bounded by the unique
//! pieces.

use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use rustc_hash::FxHashMap;

use crate::Error;
use crate::split::Splitter;

/// How often each unique piece occurs.
pub type Pieces = FxHashMap<Box<str>, u64>;

/// Counts the pieces of all texts that `next_batch` returns until it returns `None`.
///
/// Counts do not depend on `num_threads` or the batches. An error of `next_batch` ends the count
/// and is returned unchanged.
pub fn count_pieces<E: From<Error>>(
    splitter: &Splitter,
    num_threads: usize,
    mut next_batch: impl FnMut() -> Result<Option<Vec<String>>, E>,
) -> Result<Pieces, E> {
    let (sender, receiver) = sync_channel(num_threads);
    let receiver = Arc::new(Mutex::new(receiver));
    thread::scope(|scope| {
        let workers: Vec<_> = (0..num_threads)
            .map(|_| {
                let (splitter, receiver) = (splitter.clone(), Arc::clone(&receiver));
                scope.spawn(move || count_batches(&splitter, &receiver))
            })
            .collect();
        drop(receiver); // so that `send` fails, and does not block, once every worker has failed
        while let Some(batch) = next_batch()? {
            if sender.send(batch).is_err() {
                break;
            }
        }
        drop(sender);
        let mut total = Pieces::default();
        for worker in workers {
            let mut pieces = worker.join().expect("a counting thread panicked")?;
            if pieces.len() > total.len() {
                std::mem::swap(&mut pieces, &mut total); // iterate over the smaller table
            }
            for (piece, count) in pieces {
                *total.entry(piece).or_default() += count;
            }
        }
        Ok(total)
    })
}

/// Counts batches into one table until the queue closes.
fn count_batches(
    splitter: &Splitter,
    queue: &Mutex<Receiver<Vec<String>>>,
) -> Result<Pieces, Error> {
    let mut pieces = Pieces::default();
    let next_batch = || queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
    while let Ok(batch) = next_batch() {
        for text in &batch {
            splitter.for_each_piece(text, |piece| match pieces.get_mut(piece) {
                Some(count) => *count += 1,
                None => {
                    pieces.insert(piece.into(), 1);
                }
            })?;
        }
    }
    Ok(pieces)
}
