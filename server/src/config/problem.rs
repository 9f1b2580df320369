//! What is wrong with the settings, said where it stands.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use miette::{Diagnostic, LabeledSpan, NamedSource, Severity, SourceCode, SourceSpan};

/// One thing that is wrong: what, where, and what to do about it.
#[derive(Debug, Clone)]
pub struct Problem {
    what: String,
    help: String,
    place: Option<Place>,
}

#[derive(Debug, Clone)]
struct Place {
    text: Arc<NamedSource<String>>,
    span: SourceSpan,
    label: String,
}

impl Problem {
    /// A problem that stands in no file.
    pub(super) fn new(what: impl Into<String>, help: impl Into<String>) -> Problem {
        Problem {
            what: what.into(),
            help: help.into(),
            place: None,
        }
    }

    /// The same problem, with its place in a file.
    pub(super) fn at(
        mut self,
        text: &Arc<NamedSource<String>>,
        span: std::ops::Range<usize>,
        label: impl Into<String>,
    ) -> Problem {
        self.place = Some(Place {
            text: Arc::clone(text),
            span: span.into(),
            label: label.into(),
        });
        self
    }

    /// What is wrong, in one sentence.
    #[must_use]
    pub fn what(&self) -> &str {
        &self.what
    }

    /// What to do about it.
    #[must_use]
    pub fn advice(&self) -> &str {
        &self.help
    }

    /// File, line and column (both counted from 1), if it stands in a file.
    #[must_use]
    pub fn position(&self) -> Option<(&Path, usize, usize)> {
        let place = self.place.as_ref()?;
        let before = place.text.inner().get(..place.span.offset())?;
        let line = before.matches('\n').count() + 1;
        let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
        Some((Path::new(place.text.name()), line, column))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Problem {}

impl Diagnostic for Problem {
    fn severity(&self) -> Option<Severity> {
        Some(Severity::Error)
    }

    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        Some(Box::new(&self.help))
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        let place = self.place.as_ref()?;
        Some(place.text.as_ref())
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let place = self.place.as_ref()?;
        let label = LabeledSpan::new_with_span(Some(place.label.clone()), place.span);
        Some(Box::new(std::iter::once(label)))
    }
}

/// Everything that is wrong, in the order of the file; never empty.
#[derive(Debug, Clone)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// `Ok` if nothing is wrong.
    pub(super) fn none_of(mut found: Vec<Problem>) -> Result<(), Problems> {
        if found.is_empty() {
            return Ok(());
        }
        found.sort_by_key(|problem| problem.place.as_ref().map(|place| place.span.offset()));
        Err(Problems(found))
    }

    /// One by one.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.0.iter()
    }
}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Problems {
        Problems(vec![problem])
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("; ")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}
