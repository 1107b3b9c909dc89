"""VFIO devices: what /dev/vfio/devices/NAME does, over the devices of a machine (drivers/vfio).

iommufd.py      a device as vfio-pci drives it: bound to a context, attached to page tables
device_cdev.py  an open file of it: the ioctls, and what close() undoes
pci.py          what vfio-pci answers itself
"""
