//! "Did you mean …?" for a mistyped key.

/// A word further away than this many edits is a different word.
const MAX_EDITS: usize = 3;

/// The candidate that is closest to what was written, if one is close enough to be what was meant.
pub fn closest<'a>(
    written: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let allowed = MAX_EDITS.min(written.chars().count() / 2);
    candidates
        .into_iter()
        .map(|candidate| (edits(written, candidate), candidate))
        .filter(|(edits, _)| *edits <= allowed)
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance in characters. Both words are short: keys of a configuration.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, right) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(left != *right);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_finds_its_word_and_another_word_does_not() {
        let words = ["devices", "api", "operations"];
        assert_eq!(closest("device", words), Some("devices"));
        assert_eq!(closest("operatoins", words), Some("operations"));
        assert_eq!(closest("colour", words), None);
        assert_eq!(closest("x", words), None);
    }
}
