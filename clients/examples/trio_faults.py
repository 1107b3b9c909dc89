"""Page faults of a device, answered in a Trio task of their own while the main task goes on."""

import trio

from iommufd_client.aio import File, Iommufd, open_iommufd
from iommufd_client.testing import Daemon
from iommufd_uapi import iommufd as uapi
from iommufd_uapi import iommufd_test as mock


async def answer_faults(queue: File, answered: trio.Event) -> None:
    """Let every device try again: the page is there now."""
    records = await queue.receive(uapi.HwptPgfault.SIZEOF)
    fault = uapi.HwptPgfault.unpack(records)
    print(f"device {fault.dev_id} faults at {fault.addr:#x}")
    await queue.write(uapi.HwptPageResponse(fault.cookie, uapi.IOMMUFD_PAGE_RESP_SUCCESS).pack())
    answered.set()


async def main(socket_path: str) -> None:
    async with open_iommufd(socket_path, explain=True) as iommufd, trio.open_nursery() as nursery:
        ioas = await iommufd.ioas_alloc()
        device = await iommufd.mock_domain(ioas)
        parent = await iommufd.hwpt_alloc(device.out_idev_id, ioas, flags=uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)
        fault_id, queue = await iommufd.fault_queue_alloc()
        nested = await iommufd.hwpt_alloc(
            device.out_idev_id, parent, data=mock.HwptSelftest(mock.IOMMU_TEST_IOTLB_DEFAULT), fault_id=fault_id
        )
        await iommufd.test(mock.MockDomainReplace(pt_id=nested), device.out_stdev_id)

        answered = trio.Event()
        with queue:
            nursery.start_soon(answer_faults, queue, answered)
            await touch_a_missing_page(iommufd, device.out_idev_id)
            await answered.wait()
        print("answered")


async def touch_a_missing_page(iommufd: Iommufd, dev_id: int) -> None:
    await iommufd.test(mock.TriggerIopf(dev_id=dev_id, perm=uapi.IOMMU_PGFAULT_PERM_READ, addr=0xDEAD000))


if __name__ == "__main__":
    with Daemon() as daemon:
        trio.run(main, daemon.socket_path)
