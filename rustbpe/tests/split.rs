//! The scanner against the regex engine: a table of cases, every character, and random text.

use std::sync::LazyLock;

use proptest::prelude::*;
use rustbpe::Error;
use rustbpe::split::{DEFAULT_PATTERN, Splitter};

fn pieces<'t>(splitter: &Splitter, text: &'t str) -> Vec<&'t str> {
    let mut pieces = Vec::new();
    splitter
        .for_each_piece(text, |piece| pieces.push(piece))
        .unwrap();
    pieces
}

fn both() -> &'static (Splitter, Splitter) {
    static BOTH: LazyLock<(Splitter, Splitter)> = LazyLock::new(|| {
        (
            Splitter::new(DEFAULT_PATTERN).unwrap(),
            Splitter::new(&format!("(?:{DEFAULT_PATTERN})")).unwrap(), // by the engine
        )
    });
    &BOTH
}

#[test]
fn table_of_cases() {
    let cases: &[(&str, &[&str])] = &[
        ("", &[]),
        ("Hello world", &["Hello", " world"]),
        ("  two  spaces ", &[" ", " two", " ", " spaces", " "]),
        (
            "I'll we'VE 'tis o'clock",
            &["I", "'ll", " we", "'VE", " '", "tis", " o", "'clock"],
        ),
        ("it'\u{17f} '", &["it", "'\u{17f}", " '"]),
        ("12345 1a", &["12", "34", "5", " ", "1", "a"]),
        ("a, b.\n\nc", &["a", ",", " b", ".\n\n", "c"]),
        ("x \n \r\n  y", &["x", " \n \r\n", " ", " y"]),
        ("\t\tif\t1\t!", &["\t", "\tif", "\t", "1", "\t", "!"]),
        ("end  \u{3000}", &["end", "  \u{3000}"]),
        (
            "e\u{301}te\u{301} 日本語。٣٤٥",
            &["e", "\u{301}te", "\u{301}", " 日本語", "。", "٣٤", "٥"],
        ),
        (
            "(a) \"b\" ...c",
            &["(a", ")", " \"", "b", "\"", " ...", "c"],
        ),
    ];
    let (scanner, regex) = both();
    for (text, expected) in cases {
        assert_eq!(pieces(scanner, text), *expected, "scanner on {text:?}");
        assert_eq!(pieces(regex, text), *expected, "regex on {text:?}");
    }
}

/// Every character there is, between neighbours that tell the classes apart.
#[test]
fn every_character() {
    let (scanner, regex) = both();
    let characters: Vec<char> = ('\0'..=char::MAX).collect();
    for some in characters.chunks(256) {
        let text: String = some.iter().map(|c| format!("a{c}a1{c}{c} ")).collect();
        assert_eq!(pieces(scanner, &text), pieces(regex, &text));
    }
}

#[test]
fn other_patterns_use_the_engine() {
    let splitter = Splitter::new(r"\w+|x*").unwrap();
    assert_eq!(pieces(&splitter, "one, two"), ["one", "two"]);
    assert!(matches!(Splitter::new("(unclosed"), Err(Error::Pattern(_))));
}

/// A pattern that backtracks without end is an error, not a hang or a panic.
#[test]
fn hopeless_pattern() {
    let splitter = Splitter::new(r"(?:(?=a)a*)*b(?<!x)c").unwrap();
    let result = splitter.for_each_piece(&"a".repeat(200), |_| {});
    assert!(matches!(result, Err(Error::Pattern(_))), "{result:?}");
}

/// Characters on which the branches of the pattern turn, mixed with any others.
fn character() -> impl Strategy<Value = char> {
    let telling = concat!(
        "aZsSdtmlLvVreE''  \t\r\n\n19½٣.,!-(",
        "\u{a0}\u{3000}\u{85}éſßжЖ日本\u{301}\u{200d}🙂Ⅷ"
    );
    let telling: Vec<char> = telling.chars().collect();
    prop_oneof![6 => proptest::sample::select(telling), 1 => any::<char>()]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 4000, failure_persistence: None, ..Default::default()
    })]

    #[test]
    fn scanner_equals_regex(text in proptest::collection::vec(character(), 0..40)) {
        let text: String = text.into_iter().collect();
        let (scanner, regex) = both();
        prop_assert_eq!(pieces(scanner, &text), pieces(regex, &text));
        prop_assert_eq!(pieces(scanner, &text).concat(), text);
    }
}
