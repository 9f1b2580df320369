//! The command `bellwire`: parse, run, exit code.

mod cli;
#[cfg(feature = "demo")]
mod demo;

use std::process::ExitCode;

fn main() -> ExitCode {
    // First of all, because the first TLS configuration would otherwise have to guess. It fails only if somebody was
    // here before, and nobody was.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    cli::run(std::env::args_os())
}
