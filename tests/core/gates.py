"""Which gates each scenario passes, and what the kernel does not put back or does not report.

The right sides of CHANGED and SWALLOWED name the kernel function.
"""

from iommufdd.errors import EINVAL, ENOENT, ENOMEM, IommufdError
from iommufdd.user import Gate

ATTACH, CHARGE, COPY_IN, COPY_OUT = Gate.ATTACH, Gate.CHARGE, Gate.COPY_IN, Gate.COPY_OUT
DOMAIN, FD, LOOKUP, MEMORY = Gate.DOMAIN, Gate.FD, Gate.LOOKUP, Gate.MEMORY
MMAP, OBJECT, PIN, RESERVE = Gate.MMAP, Gate.OBJECT, Gate.PIN, Gate.RESERVE

GATES: dict[str, set[Gate]] = {
    "destroy": {COPY_IN},
    "destroy_mock_device": {COPY_IN},
    "ioas_alloc": {OBJECT, COPY_IN, COPY_OUT},
    "ioas_allow_iovas": {LOOKUP, COPY_IN, MEMORY},
    "ioas_iova_ranges": {LOOKUP, COPY_IN, COPY_OUT},
    "ioas_map": {LOOKUP, COPY_IN, COPY_OUT, MEMORY, PIN, CHARGE},
    "ioas_map_without_a_domain": {LOOKUP, COPY_IN, COPY_OUT, MEMORY},
    "ioas_map_file": {LOOKUP, COPY_IN, COPY_OUT, MEMORY, PIN, CHARGE},
    "ioas_map_dmabuf": {LOOKUP, COPY_IN, COPY_OUT, MEMORY},
    "ioas_copy": {LOOKUP, COPY_IN, COPY_OUT, MEMORY, PIN, CHARGE},
    "ioas_unmap": {LOOKUP, COPY_IN, COPY_OUT},
    "ioas_unmap_all": {LOOKUP, COPY_IN, COPY_OUT},
    "option_rlimit_mode": {COPY_IN, COPY_OUT},
    "option_huge_pages": {LOOKUP, COPY_IN, COPY_OUT},
    "vfio_ioas_set": {LOOKUP, COPY_IN},
    "vfio_ioas_get": {COPY_IN, COPY_OUT},
    "ioas_change_process": {COPY_IN, MEMORY},
    "get_hw_info": {LOOKUP, COPY_IN, COPY_OUT, MEMORY},
    "hwpt_alloc_paging": {OBJECT, LOOKUP, COPY_IN, COPY_OUT, MEMORY, PIN, CHARGE, DOMAIN},
    "hwpt_alloc_nested": {OBJECT, LOOKUP, COPY_IN, COPY_OUT, DOMAIN},
    "hwpt_alloc_on_viommu": {OBJECT, LOOKUP, COPY_IN, COPY_OUT, DOMAIN},
    "hwpt_set_dirty_tracking": {LOOKUP, COPY_IN},
    "hwpt_get_dirty_bitmap": {LOOKUP, COPY_IN, COPY_OUT, MEMORY},
    "hwpt_invalidate_nested": {LOOKUP, COPY_IN, COPY_OUT},
    "hwpt_invalidate_viommu": {LOOKUP, COPY_IN, COPY_OUT},
    "fault_queue_alloc": {OBJECT, COPY_IN, COPY_OUT, MEMORY, FD},
    "viommu_alloc": {OBJECT, LOOKUP, COPY_IN, COPY_OUT, MMAP},
    "vdevice_alloc": {OBJECT, LOOKUP, COPY_IN, COPY_OUT},
    "veventq_alloc": {OBJECT, LOOKUP, COPY_IN, COPY_OUT, MEMORY, FD},
    "hw_queue_alloc": {OBJECT, LOOKUP, COPY_IN, COPY_OUT, MEMORY},
    "fault_read": {COPY_OUT, MEMORY},
    "fault_write": {COPY_IN},
    "veventq_read": {COPY_OUT, MEMORY},
    "mmap": set(),
    "mock_domain": {OBJECT, LOOKUP, COPY_IN, COPY_OUT, MEMORY, PIN, CHARGE, RESERVE, DOMAIN, ATTACH},
    "mock_domain_flags": {OBJECT, LOOKUP, COPY_IN, COPY_OUT, MEMORY, RESERVE, ATTACH},
    "mock_domain_replace": {LOOKUP, COPY_IN, COPY_OUT, RESERVE, ATTACH},
    "mock_domain_replace_by_ioas": {OBJECT, LOOKUP, COPY_IN, COPY_OUT, MEMORY, PIN, CHARGE, RESERVE, DOMAIN, ATTACH},
    "pasid_attach": {LOOKUP, COPY_IN, COPY_OUT, MEMORY, ATTACH},
    "pasid_replace": {LOOKUP, COPY_IN, COPY_OUT, ATTACH},
    "pasid_detach": {LOOKUP, COPY_IN},
    "pasid_check_hwpt": {LOOKUP, COPY_IN},
    "add_reserved": {LOOKUP, COPY_IN, MEMORY},
    "md_check_map": {LOOKUP, COPY_IN, PIN},
    "md_check_refs": {COPY_IN, PIN},
    "dirty": {LOOKUP, COPY_IN, COPY_OUT, MEMORY},
    "set_temp_memory_limit": {COPY_IN},
    "create_access": {OBJECT, LOOKUP, COPY_IN, COPY_OUT, MEMORY, FD},
    "access_replace_ioas": {LOOKUP, COPY_IN, MEMORY},
    "access_pages": {COPY_IN, COPY_OUT, MEMORY, PIN, CHARGE},
    "access_pages_of_two_areas": {COPY_IN, COPY_OUT, MEMORY, PIN, CHARGE},
    "destroy_access_pages": {COPY_IN},
    "access_rw": {COPY_IN, COPY_OUT, MEMORY},
    "access_rw_slow": {COPY_IN, MEMORY, PIN},
    "md_check_iotlb": {LOOKUP, COPY_IN},
    "dev_check_cache": {LOOKUP, COPY_IN},
    "trigger_iopf": {LOOKUP, COPY_IN},
    "trigger_vevent": {LOOKUP, COPY_IN},
    "dmabuf_get": {COPY_IN, MEMORY, FD},
    "dmabuf_revoke": {COPY_IN},
    "vfio_get_api_version": set(),
    "vfio_check_extension": set(),
    "vfio_set_iommu": set(),
    "vfio_iommu_get_info": {COPY_IN, COPY_OUT},
    "vfio_iommu_map_dma": {COPY_IN, MEMORY, PIN, CHARGE},
    "vfio_iommu_unmap_dma": {COPY_IN, COPY_OUT, MEMORY},
    "unknown_number": {COPY_IN},
}

RESPOND = "iommufd_ucmd_respond() after the change"

# A failure here leaves a change behind.
CHANGED: dict[tuple[str, Gate], str] = {
    ("ioas_map", COPY_OUT): RESPOND,
    ("ioas_map_without_a_domain", COPY_OUT): RESPOND,
    ("ioas_map_file", COPY_OUT): RESPOND,
    ("ioas_map_dmabuf", COPY_OUT): RESPOND,
    ("ioas_copy", COPY_OUT): RESPOND,
    ("ioas_unmap", COPY_OUT): RESPOND,
    ("ioas_unmap_all", COPY_OUT): RESPOND,
    ("option_rlimit_mode", COPY_OUT): "iommufd_option()",
    ("option_huge_pages", COPY_OUT): "iommufd_option()",
    ("hwpt_invalidate_nested", COPY_IN): "mock_domain_cache_invalidate_user() goes entry by entry",
    ("hwpt_invalidate_nested", COPY_OUT): RESPOND,
    ("hwpt_invalidate_viommu", COPY_OUT): RESPOND,
    ("hw_queue_alloc", COPY_OUT): "mock_hw_queue_destroy() frees queue 0, whichever it is",
    ("mock_domain_replace", COPY_OUT): RESPOND,
    ("mock_domain_replace_by_ioas", COPY_OUT): RESPOND,
    ("pasid_replace", COPY_OUT): RESPOND,
    ("dirty", COPY_OUT): RESPOND,
    ("access_pages", COPY_OUT): "iommufd_test_access_pages() has counted next_id up",
    ("access_pages_of_two_areas", COPY_OUT): "iommufd_test_access_pages() has counted next_id up",
    ("vfio_iommu_unmap_dma", MEMORY): "iopt_cut_iova() does not undo the first cut",
    ("vfio_iommu_unmap_dma", COPY_OUT): "iommufd_vfio_unmap_dma()",
}

# A failure here can be a success: less is done, or it is done another way.
SWALLOWED: dict[tuple[str, Gate], str] = {
    ("hwpt_get_dirty_bitmap", COPY_IN): "iova_bitmap_set()",
    ("hwpt_get_dirty_bitmap", COPY_OUT): "iova_bitmap_set()",
    ("fault_read", MEMORY): "iommufd_fault_fops_read() returns what it has done",
    ("fault_read", COPY_OUT): "iommufd_fault_fops_read() returns what it has done",
    ("fault_write", COPY_IN): "iommufd_fault_fops_write() returns what it has done",
    ("veventq_read", MEMORY): "iommufd_veventq_fops_read() returns what it has done",
    ("veventq_read", COPY_OUT): "iommufd_veventq_fops_read() returns what it has done",
    ("mock_domain_flags", RESERVE): "iommufd_device_auto_get_domain() takes EINVAL for `does not fit`",
}

# The errnos that a failure here may give, where it is not the gate's.
TRANSLATED: dict[tuple[str, Gate], set[type[IommufdError]]] = {
    ("hwpt_alloc_paging", LOOKUP): {ENOENT, EINVAL},  # EINVAL for pt_id
    ("hwpt_alloc_nested", LOOKUP): {ENOENT, EINVAL},
    ("hwpt_alloc_on_viommu", LOOKUP): {ENOENT, EINVAL},
    ("create_access", FD): {ENOMEM},  # whatever get_unused_fd_flags() said
}
