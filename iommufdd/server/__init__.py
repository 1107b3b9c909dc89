"""The socket side: listeners, channels, descriptors, credentials, the admin plane. Only here is Trio."""
