"""The socket side of the daemon: listeners, channels, descriptors, credentials, admin plane. Only here is Trio."""
