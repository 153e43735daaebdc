"""The functions of the driver that cuda.core calls, over the stand-in device.

Parameters are those of ``cuda.h``; results go to the addresses that are passed in. The
runtime library does not work over it: it asks for what is private between the two.
"""

from tests.support.fakegpu.driver import code, devices, graphs, memory, streams
from tests.support.fakegpu.driver.state import device

__all__ = ["code", "device", "devices", "graphs", "memory", "streams"]
