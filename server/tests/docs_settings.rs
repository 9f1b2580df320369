//! The table of settings in `docs/operations.md` is the one that the code makes. `UPDATE_DOCS=1` writes it anew.

#![allow(
    clippy::unwrap_used,
    reason = "a file that cannot be read is a failed test"
)]

use bellwire_server::config::{BEGIN_MARK, END_MARK, markdown};

#[test]
fn the_operations_page_lists_exactly_these_settings() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations.md");
    let page = std::fs::read_to_string(path).unwrap();
    let (before, rest) = page.split_once(BEGIN_MARK).unwrap();
    let (table, after) = rest.split_once(END_MARK).unwrap();
    let wanted = markdown();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(
            path,
            format!("{before}{BEGIN_MARK}\n{wanted}{END_MARK}{after}"),
        )
        .unwrap();
        return;
    }
    assert!(
        table.trim() == wanted.trim(),
        "docs/operations.md does not list the settings as the code has them; write it anew with: UPDATE_DOCS=1 cargo \
         test -p bellwire-server --test docs_settings"
    );
}
