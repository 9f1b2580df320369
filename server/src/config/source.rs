//! Reads the file and the environment, and remembers where each value stood.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use miette::NamedSource;
use toml::de::{DeTable, DeValue};

use super::keys;
use super::problem::{Problem, Problems};
use super::setting::{AnyKey, Given, Key, Setting};
use super::{DEFAULT_FILE, closest};

/// What every variable that overrides a key starts with: `BELLWIRE__SECTION__KEY`.
pub const ENV_PREFIX: &str = "BELLWIRE__";

/// Most bytes of a settings file; a real one has a few kilobytes.
pub const MAX_FILE_BYTES: u64 = 1 << 20;

/// The variables that settings may come from.
#[derive(Debug, Clone, Default)]
pub struct Environment(Vec<(String, Result<String, ()>)>);

impl Environment {
    /// Those of this process.
    #[must_use]
    pub fn of_process() -> Environment {
        Environment(
            std::env::vars_os()
                .filter_map(|(name, value)| {
                    let name = name.into_string().ok()?;
                    name.starts_with(ENV_PREFIX)
                        .then(|| (name, value.into_string().map_err(|_| ())))
                })
                .collect(),
        )
    }

    /// These ones.
    pub fn of(variables: impl IntoIterator<Item = (&'static str, &'static str)>) -> Environment {
        Environment(
            variables
                .into_iter()
                .map(|(name, value)| (name.to_owned(), Ok(value.to_owned())))
                .collect(),
        )
    }
}

/// Where a value stood.
#[derive(Debug, Clone)]
enum Origin {
    /// In the file, at these bytes.
    File(Range<usize>),
    /// In a variable.
    Variable(String),
}

/// Everything that was set, by key, with its origin. Keys that nobody knows were sorted out before.
#[derive(Debug)]
pub struct Source {
    file: Option<Arc<NamedSource<String>>>,
    given: BTreeMap<&'static str, (Given, Origin)>,
    /// What was set for one app, by its name and the key that it stands in for.
    apps: BTreeMap<(String, &'static str), (Given, Origin)>,
    problems: RefCell<Vec<Problem>>,
}

impl Source {
    /// Reads both. The environment wins over the file.
    ///
    /// # Errors
    /// A file that is missing, cannot be read, or is no TOML; nothing else can be checked then.
    pub fn read(named: Option<&Path>, environment: &Environment) -> Result<Source, Problems> {
        Source::understand(read_file(named)?, environment)
    }

    /// The same, of a file that was read.
    pub(super) fn understand(
        file: Option<(PathBuf, String)>,
        environment: &Environment,
    ) -> Result<Source, Problems> {
        let mut source = Source {
            file: file.map(|(path, text)| {
                Arc::new(NamedSource::new(path.display().to_string(), text).with_language("toml"))
            }),
            given: BTreeMap::new(),
            apps: BTreeMap::new(),
            problems: RefCell::default(),
        };
        source.take_file()?;
        source.take_environment(environment);
        Ok(source)
    }

    /// The value of a key, or its default. A value that does not do is noted, and the default stands in for it.
    pub(super) fn get<S: Setting>(&self, key: &Key<S>) -> S::Value {
        self.find(key).unwrap_or_else(|| {
            key.setting
                .parse(&Given::Text(key.default.to_owned()))
                .unwrap_or_else(|unfit| unreachable!("the default of {} {}", key.name, unfit.what))
        })
    }

    /// The value of a key that has no default.
    pub(super) fn find<S: Setting>(&self, key: &Key<S>) -> Option<S::Value> {
        let (given, _) = self.given.get(key.name)?;
        match key.setting.parse(given) {
            Ok(value) => Some(value),
            Err(unfit) => {
                self.note(key, &unfit.what, &unfit.help);
                None
            }
        }
    }

    /// Whether somebody set this key.
    pub(super) fn is_set(&self, key: &dyn AnyKey) -> bool {
        self.given.contains_key(key.name())
    }

    /// Everything that was given.
    pub(super) fn values(&self) -> BTreeMap<&'static str, Given> {
        self.given
            .iter()
            .map(|(name, (given, _))| (*name, given.clone()))
            .collect()
    }

    /// Everything that was given for single apps.
    pub(super) fn app_values(&self) -> BTreeMap<(String, &'static str), Given> {
        self.apps
            .iter()
            .map(|(place, (given, _))| (place.clone(), given.clone()))
            .collect()
    }

    /// The apps that something was set for.
    pub(super) fn apps(&self) -> BTreeSet<String> {
        self.apps.keys().map(|(app, _)| app.clone()).collect()
    }

    /// The value of a key for an app: its own, or else that for all.
    pub(super) fn get_of<S: Setting>(&self, app: &str, key: &Key<S>) -> S::Value {
        let own = self.apps.get(&(app.to_owned(), key.name));
        let own = own.and_then(|(given, origin)| match key.setting.parse(given) {
            Ok(value) => Some(value),
            Err(unfit) => {
                let name = name_of(app, key.name);
                self.note_at(&name, Some(origin), &unfit.what, &unfit.help);
                None
            }
        });
        own.unwrap_or_else(|| self.get(key))
    }

    /// Notes that something is wrong with a key, wherever it was set.
    pub(super) fn note(&self, key: &dyn AnyKey, what: &str, help: &str) {
        let name = key.name();
        let origin = self.given.get(name).map(|(_, origin)| origin);
        self.note_at(name, origin, what, help);
    }

    fn note_at(&self, name: &str, origin: Option<&Origin>, what: &str, help: &str) {
        let problem = match (origin, &self.file) {
            (Some(Origin::Variable(variable)), _) => {
                Problem::new(format!("{variable} ({name}): {what}"), help)
            }
            (Some(Origin::File(value)), Some(text)) => {
                Problem::new(format!("{name}: {what}"), help).at(text, value.clone(), "here")
            }
            (Some(Origin::File(_)) | None, _) => Problem::new(format!("{name}: {what}"), help),
        };
        self.problems.borrow_mut().push(problem);
    }

    /// `Ok` if nothing was noted.
    pub(super) fn verdict(&self) -> Result<(), Problems> {
        Problems::none_of(self.problems.borrow().clone())
    }

    fn take_file(&mut self) -> Result<(), Problems> {
        let Some(text) = self.file.clone() else {
            return Ok(());
        };
        let table = DeTable::parse(text.inner()).map_err(|error| {
            let problem = Problem::new(
                format!("this is not TOML: {}", error.message()),
                "text values stand in \"quotes\", a section starts with [name] on a line of its own",
            );
            Problems::from(match error.span() {
                Some(span) => problem.at(&text, span, "the reader stopped here"),
                None => problem,
            })
        })?;
        for (key, value) in table.get_ref() {
            let (name, key_span) = (key.get_ref().as_ref(), key.span());
            if let DeValue::Table(section) = value.get_ref() {
                for (key, value) in section {
                    let full = format!("{name}.{}", key.get_ref());
                    if full == APPS
                        && let DeValue::Table(apps) = value.get_ref()
                    {
                        self.take_file_apps(&text, apps);
                        continue;
                    }
                    self.take_file_key(&text, &full, key.span(), value.get_ref(), value.span());
                }
                if section.is_empty()
                    && !keys::ALL
                        .iter()
                        .any(|key| section_of(key.name()) == Some(name))
                {
                    self.unknown(name, Some((&text, key_span)));
                }
            } else {
                self.take_file_key(&text, name, key_span, value.get_ref(), value.span());
            }
        }
        Ok(())
    }

    fn take_file_apps(&mut self, text: &Arc<NamedSource<String>>, apps: &DeTable<'_>) {
        for (app, own) in apps {
            let DeValue::Table(own) = own.get_ref() else {
                self.unknown(
                    &format!("{APPS}.{}", app.get_ref()),
                    Some((text, app.span())),
                );
                continue;
            };
            for (key, value) in own {
                let app: &str = app.get_ref();
                match known_per_app(key.get_ref()) {
                    Some(known) => {
                        let origin = Origin::File(value.span());
                        let place = (app.to_owned(), known);
                        self.apps.insert(place, (given(value.get_ref()), origin));
                    }
                    None => self.unknown(
                        &format!("{APPS}.{app}.{}", key.get_ref()),
                        Some((text, key.span())),
                    ),
                }
            }
        }
    }

    fn take_file_key(
        &mut self,
        text: &Arc<NamedSource<String>>,
        name: &str,
        key: Range<usize>,
        value: &DeValue<'_>,
        span: Range<usize>,
    ) {
        match known(name) {
            Some(known) => {
                let origin = Origin::File(span);
                self.given.insert(known, (given(value), origin));
            }
            None => self.unknown(name, Some((text, key))),
        }
    }

    fn take_environment(&mut self, environment: &Environment) {
        for (variable, value) in &environment.0 {
            let Some(rest) = variable.strip_prefix(ENV_PREFIX) else {
                continue;
            };
            let name = rest.to_ascii_lowercase().replace("__", ".");
            let of_app = name
                .strip_prefix(APPS)
                .and_then(|rest| rest.strip_prefix('.')?.rsplit_once('.'))
                .and_then(|(app, key)| Some((app.to_owned(), known_per_app(key)?)));
            let known = known(&name);
            if known.is_none() && of_app.is_none() {
                self.unknown_variable(variable, &name);
                continue;
            }
            let Ok(value) = value else {
                self.problems.borrow_mut().push(Problem::new(
                    format!("{variable}: the value is not UTF-8"),
                    "set it to plain text",
                ));
                continue;
            };
            let origin = Origin::Variable(variable.clone());
            let given = (Given::Text(value.clone()), origin);
            if let Some(known) = known {
                self.given.insert(known, given);
            } else if let Some(place) = of_app {
                self.apps.insert(place, given);
            }
        }
    }

    fn unknown(&self, name: &str, place: Option<(&Arc<NamedSource<String>>, Range<usize>)>) {
        let problem = Problem::new(format!("{name} is not a setting"), advice(name));
        self.problems.borrow_mut().push(match place {
            Some((text, span)) => problem.at(text, span, "not known"),
            None => problem,
        });
    }

    fn unknown_variable(&self, variable: &str, name: &str) {
        let help = match guess(name) {
            Some(key) => format!("did you mean {}?", variable_of(key)),
            None => LIST_OF_KEYS.to_owned(),
        };
        self.problems
            .borrow_mut()
            .push(Problem::new(format!("{variable} is not a setting"), help));
    }
}

/// Where single apps have values of their own.
const APPS: &str = "quota.apps";

/// The key for all apps that a name under [`APPS`] stands in for.
fn known_per_app(short: &str) -> Option<&'static str> {
    keys::PER_APP
        .iter()
        .map(|key| key.name())
        .find(|name| name.strip_prefix("quota.") == Some(short))
}

/// What a key is called for one app.
fn name_of(app: &str, key: &str) -> String {
    format!("{APPS}.{app}.{}", key.trim_start_matches("quota."))
}

/// The variable that overrides a key.
#[must_use]
pub fn variable_of(name: &str) -> String {
    format!(
        "{ENV_PREFIX}{}",
        name.to_ascii_uppercase().replace('.', "__")
    )
}

const LIST_OF_KEYS: &str =
    "docs/operations.md lists every setting; remove it, or look for its name there";

fn advice(name: &str) -> String {
    match guess(name) {
        Some(key) => match (section_of(key), section_of(name)) {
            (Some(section), meant) if meant != Some(section) => {
                let short = key.rsplit('.').next().unwrap_or(key);
                format!("did you mean {short} in the section [{section}]?")
            }
            (Some(_), _) => format!("did you mean {}?", key.rsplit('.').next().unwrap_or(key)),
            (None, _) => format!("did you mean {key}, at the top of the file?"),
        },
        None => LIST_OF_KEYS.to_owned(),
    }
}

/// The known key that was probably meant: a slip in the name, or the right name in the wrong section.
fn guess(name: &str) -> Option<&'static str> {
    let names = || keys::ALL.iter().map(|key| key.name());
    let last = name.rsplit('.').next().unwrap_or(name);
    let short = |key: &'static str| key.rsplit('.').next().unwrap_or(key);
    closest(name, names()).or_else(|| {
        let meant = closest(last, names().map(short))?;
        let mut same = names().filter(|key| short(key) == meant);
        let first = same.next()?;
        // A short name that stands in several sections is no guess.
        same.next().is_none().then_some(first)
    })
}

fn known(name: &str) -> Option<&'static str> {
    keys::ALL
        .iter()
        .map(|key| key.name())
        .find(|known| *known == name)
}

fn section_of(name: &str) -> Option<&str> {
    name.split_once('.').map(|(section, _)| section)
}

fn given(value: &DeValue<'_>) -> Given {
    match value {
        DeValue::String(text) => Given::Text(text.to_string()),
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
            .map_or(Given::Other("a number beyond all bounds"), Given::Number),
        DeValue::Boolean(flag) => Given::Flag(*flag),
        DeValue::Array(list) => list
            .iter()
            .map(|item| item.get_ref().as_str().map(str::to_owned))
            .collect::<Option<Vec<_>>>()
            .map_or(
                Given::Other("a list of other things than texts"),
                Given::List,
            ),
        DeValue::Float(_) => Given::Other("a fraction"),
        DeValue::Datetime(_) => Given::Other("a date"),
        DeValue::Table(_) => Given::Other("a section"),
    }
}

fn read_file(named: Option<&Path>) -> Result<Option<(PathBuf, String)>, Problems> {
    let path = named.unwrap_or(Path::new(DEFAULT_FILE));
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound && named.is_none() => {
            return Ok(None);
        }
        Err(error) => return Err(unreadable(path, &error)),
    };
    let mut text = String::new();
    let read = Read::by_ref(&mut file)
        .take(MAX_FILE_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(|error| unreadable(path, &error))?;
    if u64::try_from(read).unwrap_or(u64::MAX) > MAX_FILE_BYTES {
        return Err(Problem::new(
            format!("{} is larger than {MAX_FILE_BYTES} bytes", path.display()),
            "this is hardly a settings file: name the right one with --config",
        )
        .into());
    }
    Ok(Some((path.to_owned(), text)))
}

fn unreadable(path: &Path, error: &io::Error) -> Problems {
    let kind = error.kind();
    let help = if kind == io::ErrorKind::NotFound {
        "name a file that is there with --config, or leave it out: without a file every setting has its default"
    } else if kind == io::ErrorKind::PermissionDenied {
        "let the user that runs bellwire read it"
    } else if kind == io::ErrorKind::InvalidData {
        "the file must be UTF-8 text"
    } else {
        "look at the file and the disk it lies on"
    };
    Problem::new(
        format!(
            "the settings file {} cannot be read: {error}",
            path.display()
        ),
        help,
    )
    .into()
}
