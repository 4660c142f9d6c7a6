"""Jobs: the durable queue, the stream on which workers take from it, and schedules."""
