//! The story, step by step. Each step is checked for real; the first that does not happen ends the tour.

use std::sync::Arc;
use std::time::Duration;

use bellwire_certs::{IfExists, write_private};
use bellwire_client::{Carrier, Carriers};
use http::Method;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::device::{Device, Diary, Identity};
use super::screen::Screen;
use super::stage::Stage;
use crate::cli::{Api, Failure, encode};

/// Longest time for a step; on an idle machine each takes milliseconds.
const STEP_LIMIT: Duration = Duration::from_secs(30);
/// How often the API is asked whether something has changed.
const ASK_EVERY: Duration = Duration::from_millis(10);
/// How long a ping waits for its acknowledgement.
const WAIT_S: u64 = 20;

/// The devices in the story.
struct Story<'a> {
    stage: &'a mut Stage,
    screen: &'a Arc<Screen>,
    api: Api,
    anna: Identity,
    ben: Identity,
}

/// Tells the whole story and leaves both devices connected.
pub(super) async fn tour(stage: &mut Stage, screen: &Arc<Screen>) -> Result<Vec<Device>, Failure> {
    start(stage, screen).await?;
    let api = stage.api()?;
    let (anna, ben) = enrol(stage, screen, &api).await?;
    let mut story = Story {
        stage,
        screen,
        api,
        anna,
        ben,
    };
    let (anna, ben) = story.connect().await?;
    story.native_ping(&anna).await?;
    story.rhoconnect_ping(&ben).await?;
    let diary = story.away(anna, "Anna's phone leaves").await?;
    let waiting = story.ping_absent().await?;
    story.crash_and_return(&ben, &waiting).await?;
    let anna = story.delivered_once(diary, &waiting).await?;
    let anna = story.expires(anna, &waiting).await?;
    Ok(vec![anna, ben])
}

async fn start(stage: &mut Stage, screen: &Screen) -> Result<(), Failure> {
    screen.step("Start a server: embedded store, certificates made on the spot, free ports");
    let began = screen.begin();
    let listen = stage.start().await?;
    let (devices, api) = (listen.devices, listen.api_url());
    screen.good("ready", began);
    screen.note(&format!("devices on {devices} (UDP and TCP), API on {api}"));
    screen.note(&format!("data in {}", stage.data().display()));
    Ok(())
}

async fn enrol(stage: &Stage, screen: &Screen, api: &Api) -> Result<(Identity, Identity), Failure> {
    screen.step("Enrol two devices: POST /v1/devices");
    let mut enrolled = Vec::new();
    for (user, name, carriers) in [
        ("anna", "anna's phone", Carriers::Quic),
        ("ben", "ben's scanner", Carriers::WebSocket),
    ] {
        let began = screen.begin();
        let (id, secret) = register(api, user, name).await?;
        screen.good(&format!("{name} is {id}"), began);
        enrolled.push(Identity {
            name,
            id,
            secret,
            server: stage.listening()?.devices.to_string(),
            ca: stage.ca(),
            state: stage.path().join(user),
            carriers,
        });
    }
    let both: Result<[Identity; 2], _> = enrolled.try_into();
    both.map(|[anna, ben]| (anna, ben))
        .map_err(|_| Failure::new("two devices were to be enrolled", "please report it"))
}

async fn register(api: &Api, user: &str, name: &str) -> Result<(String, String), Failure> {
    let body = json!({ "user": user, "name": name });
    let answer = api.ask(Method::POST, "/v1/devices", Some(&body)).await?;
    Ok((member(&answer, "device")?, member(&answer, "secret")?))
}

impl Story<'_> {
    async fn connect(&self) -> Result<(Device, Device), Failure> {
        self.screen
            .step("Connect them with the reference client, one over each carrier");
        let anna = self
            .switch_on(&self.anna, Arc::default(), Carrier::Quic)
            .await?;
        let ben = self
            .switch_on(&self.ben, Arc::default(), Carrier::WebSocket)
            .await?;
        Ok((anna, ben))
    }

    async fn switch_on(
        &self,
        identity: &Identity,
        diary: Arc<Diary>,
        carrier: Carrier,
    ) -> Result<Device, Failure> {
        let began = self.screen.begin();
        let device = Device::on(identity, diary, Arc::clone(self.screen)).await?;
        let what = format!("{} connects", identity.name);
        device
            .diary()
            .until(&what, STEP_LIMIT, |diary| diary.carrier() == Some(carrier))
            .await?;
        let over = match carrier {
            Carrier::Quic => "QUIC (UDP)",
            Carrier::WebSocket => "WebSocket (TLS over TCP)",
        };
        self.screen.good(
            &format!("{} is connected over {over}", identity.name),
            began,
        );
        Ok(device)
    }

    async fn native_ping(&self, anna: &Device) -> Result<(), Failure> {
        self.screen
            .step("Ping anna: POST /v1/pings?wait=acknowledged");
        let began = self.screen.begin();
        let body =
            json!({ "to": { "user": "anna" }, "title": "Order 7", "body": "Ready at gate 3" });
        let answer = self.ping_and_wait(&body).await?;
        let ping = member(&answer, "id")?;
        expect(
            "the ping is acknowledged by anna's phone",
            state(&answer, "outcomes", &self.anna.id) == "acknowledged",
        )?;
        expect(
            "the app on anna's phone was called once",
            anna.diary().times(&ping) == 1,
        )?;
        self.screen.good(
            "from the backend to the app on the phone, acknowledged, and back",
            began,
        );
        self.screen.note(&format!("ping {ping}"));
        Ok(())
    }

    async fn rhoconnect_ping(&self, ben: &Device) -> Result<(), Failure> {
        self.screen
            .step("Ping ben as an older backend does: POST /rc/v1/users/ping (RhoConnect)");
        let began = self.screen.begin();
        let text = "Inventory has changed";
        self.api
            .rhoconnect_ping(&[
                ("user_id", "ben"),
                ("message", text),
                ("vibrate", "2000"),
                ("sources[]", "Product"),
            ])
            .await?;
        ben.diary()
            .until("ben's scanner is called", STEP_LIMIT, |diary| {
                diary.has_body(text)
            })
            .await?;
        self.screen.good(
            "answered 200 with an empty body, and the app on the scanner was called",
            began,
        );
        Ok(())
    }

    /// A device leaves; the server knows.
    async fn away(&self, device: Device, heading: &str) -> Result<Arc<Diary>, Failure> {
        self.screen.step(heading);
        let began = self.screen.begin();
        let diary = device.close().await;
        let path = format!("/v1/devices/{}", encode(&self.anna.id));
        self.until("the server sees that it is gone", &path, |answer| {
            answer.get("attached").is_none()
        })
        .await?;
        self.screen
            .good("GET /v1/devices/{id} says: not connected", began);
        Ok(diary)
    }

    async fn ping_absent(&self) -> Result<String, Failure> {
        self.screen.step("Ping anna while her phone is away");
        let began = self.screen.begin();
        let body = json!({ "to": { "user": "anna" }, "title": "Order 8", "body": "Waits for you" });
        let answer = self.api.ask(Method::POST, "/v1/pings", Some(&body)).await?;
        let ping = member(&answer, "id")?;
        self.screen.good("202: written to disk and synced", began);
        self.still_waiting(&ping).await?;
        Ok(ping)
    }

    async fn still_waiting(&self, ping: &str) -> Result<(), Failure> {
        let began = self.screen.begin();
        let answer = self
            .api
            .ask(Method::GET, &format!("/v1/pings/{ping}"), None)
            .await?;
        expect(
            "the notification waits for the phone",
            state(&answer, "devices", &self.anna.id) == "waiting",
        )?;
        self.screen.good("GET /v1/pings/{id} says: waiting", began);
        Ok(())
    }

    async fn crash_and_return(&mut self, ben: &Device, ping: &str) -> Result<(), Failure> {
        self.screen
            .step("Kill the server with SIGKILL, and start it again");
        let sessions = ben.diary().sessions();
        let began = self.screen.begin();
        self.stage.crash().await?;
        self.screen.good("killed: no drain, no last commit", began);
        let began = self.screen.begin();
        self.stage.start().await?;
        self.screen.good("ready again, on the same ports", began);
        self.still_waiting(ping).await?;
        let began = self.screen.begin();
        ben.diary()
            .until("ben's scanner comes back", STEP_LIMIT, |diary| {
                diary.sessions() > sessions && diary.carrier().is_some()
            })
            .await?;
        self.screen.good("ben's scanner came back by itself", began);
        Ok(())
    }

    async fn delivered_once(&self, diary: Arc<Diary>, ping: &str) -> Result<Device, Failure> {
        self.screen.step("Bring anna's phone back");
        let began = self.screen.begin();
        let anna = self.switch_on(&self.anna, diary, Carrier::Quic).await?;
        anna.diary()
            .until("the notification reaches the phone", STEP_LIMIT, |diary| {
                diary.times(ping) > 0
            })
            .await?;
        self.screen.good(
            "the notification from before the crash has reached its app",
            began,
        );
        let began = self.screen.begin();
        let path = format!("/v1/pings/{ping}");
        self.until("the ping is acknowledged", &path, |answer| {
            state(answer, "devices", &self.anna.id) == "acknowledged"
        })
        .await?;
        self.screen
            .good("GET /v1/pings/{id} says: acknowledged", began);
        Ok(anna)
    }

    /// Never late: what ran out is not delivered, and what was delivered does not come again.
    async fn expires(&self, anna: Device, earlier: &str) -> Result<Device, Failure> {
        let diary = self
            .away(
                anna,
                "A TTL runs out: the phone leaves again, and is pinged with ttl_s 1",
            )
            .await?;
        let began = self.screen.begin();
        let body = json!({ "to": { "user": "anna" }, "body": "Too late", "ttl_s": 1 });
        let answer = self.api.ask(Method::POST, "/v1/pings", Some(&body)).await?;
        let late = member(&answer, "id")?;
        let path = format!("/v1/pings/{late}");
        self.until("the notification expires", &path, |answer| {
            state(answer, "devices", &self.anna.id) == "expired"
        })
        .await?;
        self.screen.good("GET /v1/pings/{id} says: expired", began);

        self.screen
            .step("The phone returns: what ran out never comes, what came does not come again");
        let anna = self.switch_on(&self.anna, diary, Carrier::Quic).await?;
        let began = self.screen.begin();
        // In order, so whatever the server still had for it would have come before this one.
        let body = json!({ "to": { "user": "anna" }, "body": "That is all" });
        let answer = self.ping_and_wait(&body).await?;
        let last = member(&answer, "id")?;
        expect(
            "the last ping is acknowledged",
            state(&answer, "outcomes", &self.anna.id) == "acknowledged",
        )?;
        expect(
            "the app was called once with the last ping",
            anna.diary().times(&last) == 1,
        )?;
        expect(
            "the app was never called with what ran out",
            anna.diary().times(&late) == 0,
        )?;
        expect(
            "the app was called once with what survived the crash",
            anna.diary().times(earlier) == 1,
        )?;
        self.screen.good(
            "calls of the app: 0 of what ran out, 1 of what survived, 1 of the last",
            began,
        );
        Ok(anna)
    }

    async fn ping_and_wait(&self, body: &Value) -> Result<Value, Failure> {
        let path = format!("/v1/pings?wait=acknowledged&timeout_s={WAIT_S}");
        self.api
            .ask_waiting(
                Method::POST,
                &path,
                Some(body),
                &[],
                Duration::from_secs(WAIT_S),
            )
            .await
    }

    /// Asks until it is so.
    async fn until(
        &self,
        what: &str,
        path: &str,
        so: impl Fn(&Value) -> bool,
    ) -> Result<(), Failure> {
        let asking = async {
            loop {
                let answer = self.api.ask(Method::GET, path, None).await?;
                if so(&answer) {
                    return Ok(());
                }
                sleep(ASK_EVERY).await;
            }
        };
        timeout(STEP_LIMIT, asking).await.unwrap_or_else(|_| {
            Err(Failure::new(
                format!(
                    "{what}: this did not happen within {} s",
                    STEP_LIMIT.as_secs()
                ),
                self.stage.log_hint(),
            ))
        })
    }
}

/// Prints what to try by hand, with one more device of anna's to listen with.
pub(super) async fn by_hand(stage: &Stage, screen: &Screen) -> Result<(), Failure> {
    let api = stage.api()?;
    let (device, secret) = register(&api, "anna", "anna's terminal").await?;
    let credentials = stage.path().join("terminal.json");
    let content = json!({ "device": device, "secret": secret });
    write_private(
        &credentials,
        format!("{content}\n").as_bytes(),
        IfExists::Replace,
    )
    .map_err(|error| Failure::new(error.to_string(), "look at the volume of the directory"))?;
    let listen = stage.listening()?;
    screen.say("The server goes on. Ring anna from another terminal; her phone here shows it:");
    screen.command(&format!(
        "curl -H \"Authorization: Bearer $(cat {})\" \\\n        -H 'Content-Type: application/json' \\\n        -d \
         '{{\"to\": {{\"user\": \"anna\"}}, \"title\": \"Hello\", \"body\": \"from curl\"}}' \\\n        {}/v1/pings",
        stage.key_file().display(),
        listen.api_url(),
    ));
    screen.say("A second device of anna's, in a third terminal, from this source tree:");
    screen.command(&format!(
        "cargo run --release -p bellwire-client -- listen --server {} \\\n        --ca {} \\\n        --credentials {} \
         \\\n        --state-dir {}",
        listen.devices,
        stage.ca().display(),
        credentials.display(),
        stage.path().join("terminal").display(),
    ));
    screen.say("Ctrl-C ends it. What arrives here:");
    Ok(())
}

fn member(answer: &Value, name: &str) -> Result<String, Failure> {
    answer
        .get(name)
        .and_then(Value::as_str)
        .map(str::to_owned)
        .ok_or_else(|| {
            Failure::new(
                format!("the answer of the API lacks `{name}`"),
                "please report it",
            )
        })
}

/// The state of a device's part of a ping; empty if the device is not in the list.
fn state<'a>(answer: &'a Value, list: &str, device: &str) -> &'a str {
    let entries = answer.get(list).and_then(Value::as_array);
    entries
        .into_iter()
        .flatten()
        .find(|entry| entry.get("device").and_then(Value::as_str) == Some(device))
        .and_then(|entry| entry.get("state").and_then(Value::as_str))
        .unwrap_or_default()
}

fn expect(what: &str, so: bool) -> Result<(), Failure> {
    if so {
        Ok(())
    } else {
        Err(Failure::new(
            format!("this did not happen: {what}"),
            "please report it",
        ))
    }
}
