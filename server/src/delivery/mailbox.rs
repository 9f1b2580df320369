//! One device's undelivered notifications.
