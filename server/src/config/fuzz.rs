//! Settings of somebody who means harm, as a plain function for fuzzing. It must not panic.

use super::{Checked, Environment, Source};

/// Reads the text of a settings file.
pub fn settings_file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let file = Some(("fuzz.toml".into(), text.to_owned()));
    let checked = Source::understand(file, &Environment::default())
        .and_then(|source| Checked::from_source(&source));
    // Placing a problem in the text is part of telling it.
    if let Err(problems) = checked {
        for problem in problems.iter() {
            let _ = (problem.position(), problem.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn odd_files_are_told_about_and_not_stumbled_over() {
        for text in [
            "",
            "\u{feff}data_dir = 'x'",
            "[listen]\r\napi = 'é:1'\r\n",
            "listen = 3",
            "[limits]\nmailbox_bytes = 99999999999999999999999999999999999999999",
            "limits.content_bytes = -0x1",
            "[[listen]]\napi = 1",
            "[store]\nengine = ['sled']\n[store]",
            "'\u{1F514}' = { a = { b = 1 } }",
            "data_dir = \"\\u0000\"",
            "tls.cert = 1979-05-27\ntls.key = nan",
            "[limits]\nexempt_networks = ['1.2.3.4/99', 5]",
            "log.level = '=,=,::=info'",
        ] {
            super::settings_file(text.as_bytes());
        }
        super::settings_file(b"\xff");
        super::settings_file("[".repeat(10_000).as_bytes());
        super::settings_file(format!("a = {}", "[".repeat(10_000)).as_bytes());
    }
}
