"""Where shards lie and how their bytes are read: local files, HTTP, object stores, and what must be spooled first."""
