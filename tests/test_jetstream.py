"""Groups that NATS keeps: the stream of a namespace, and what becomes of it."""
