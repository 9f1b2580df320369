//! The table of settings for `docs/operations.md`.

use std::fmt::Write;

use super::keys;
use super::reload::is_live;
use super::source::variable_of;

/// The line before the table in the document.
pub const BEGIN_MARK: &str = "<!-- generated:settings -->";
/// The line after it.
pub const END_MARK: &str = "<!-- /generated:settings -->";

/// Every setting as a Markdown table.
#[must_use]
pub fn markdown() -> String {
    let mut table = String::from(
        "| setting | default | takes | reload | what it is for |\n| --- | --- | --- | --- | --- |\n",
    );
    for key in keys::ALL {
        let default = match key.default() {
            "" => "none".to_owned(),
            default => format!("`{default}`"),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            table,
            "| `{}` | {default} | {} | {} | {} |",
            key.name(),
            key.takes().replace('|', "\\|"),
            if is_live(key.name()) {
                "yes"
            } else {
                "restart"
            },
            key.about().trim().replace('|', "\\|"),
        );
    }
    let example = keys::LISTEN_API.name;
    let _ = writeln!(
        table,
        "\nThe variable for `{example}` is `{}`, and so on.",
        variable_of(example)
    );
    table
}
