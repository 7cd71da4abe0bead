//! The speed of each part on made-up text: `cargo bench`. dev/bench/bpe_speed.py measures the whole on real text.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rustbpe::Error;
use rustbpe::count::count_pieces;
use rustbpe::encode::Encoder;
use rustbpe::split::{DEFAULT_PATTERN, Splitter};
use rustbpe::train::train;

const NUM_WORDS: u32 = 200_000;
const VOCAB_SIZE: u32 = 4096;

/// Words of five syllables at most, the short ones far more frequent, with punctuation and numbers between.
fn text() -> String {
    const SYLLABLES: [&str; 16] = [
        "ta", "re", "in", "mo", "su", "é", "th", "el", "on", "ka", "ri", "pu", "ши", "ed", "an",
        "lo",
    ];
    let mut random: u32 = 1;
    let mut text = String::new();
    for index in 0..NUM_WORDS {
        loop {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            text.push_str(SYLLABLES[(random >> 28) as usize]);
            if random >> 27 & 1 == 0 {
                break;
            }
        }
        match index % 12 {
            5 => text.push_str(", "),
            11 => text.push_str(" 2024.\n"),
            _ => text.push(' '),
        }
    }
    text
}

fn bench(c: &mut Criterion) {
    let text = text();
    let scanner = Splitter::new(DEFAULT_PATTERN).expect("the default pattern");
    let regex = Splitter::with_regex(DEFAULT_PATTERN).expect("the default pattern");
    let count = |threads| {
        let mut batches = [vec![text.clone()]].into_iter();
        count_pieces(&scanner, threads, || Ok::<_, Error>(batches.next())).expect("counts")
    };
    let pieces = count(1);
    let merges = train(&pieces, VOCAB_SIZE).expect("merges");
    let encoder = Encoder::new(scanner.clone(), merges);

    let mut group = c.benchmark_group("bpe");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(text.len() as u64));
    for (name, splitter) in [("split/scanner", &scanner), ("split/regex", &regex)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                splitter.for_each_piece(&text, |piece| {
                    black_box(piece);
                })
            });
        });
    }
    group.bench_function("count", |b| b.iter(|| count(1)));
    group.bench_function("train", |b| b.iter(|| train(&pieces, VOCAB_SIZE)));
    group.bench_function("encode", |b| b.iter(|| encoder.encode(&text)));
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
