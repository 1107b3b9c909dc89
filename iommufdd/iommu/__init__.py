"""The hardware models, one file each, behind the Protocols of `ops`."""
