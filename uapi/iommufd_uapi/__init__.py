"""The uAPI of iommufd: what both ends of the socket agree on. One module per header, and named like it."""
