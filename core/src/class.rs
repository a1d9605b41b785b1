/// What the holder of an error should do about it. Every error enum of Shoal maps onto one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Try again, here or elsewhere: the failure was the moment's.
    Retry,
    /// Try again later: there is no room now.
    Backpressure,
    /// The request is wrong and will stay so.
    Client,
    /// The process, the model or the deployment is wrong; no request can mend it.
    Fatal,
}
