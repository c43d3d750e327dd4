"""One result, several sinks. Text from a checkpoint is escaped in all of them but JSON."""
