"""Keys and certificates of a federation: a private CA, the coordinator's certificate and one
key pair for each device.

    ROOT/ca/        ca.key  ca.crt                              keep offline; needed only to renew
    ROOT/server/    ca.crt  server.crt  server.key  devices/NAME.pub…    what the coordinator needs
    ROOT/devices/NAME/      ca.crt  device.key                  what that device needs

Everything is planned in memory first, so that a mistake changes nothing; then files are written one by one,
each whole or absent: the CA, the server, the devices, and of each the private key before what is made from
it. So what a crash leaves can be told from what a person moved away. A private key without its certificate or
public key is a job half done, and running again finishes it. A certificate or public key without its private
key was delivered: the key lives elsewhere, and nothing here may replace it unasked.

A CA is renewed with its own key and name, so certificates it signed before and copies of ca.crt
handed out before stay good together. Private keys are 0600 from their first byte and lie in folders
of 0700, whatever the umask.
"""

from fedtune.provision.certificates import days_left
from fedtune.provision.federation import inspect, load_devices, make, renew
from fedtune.provision.layout import Item, Report
from fedtune.provision.names import check_host, device_names, names_in_short, sans

__all__ = [
    "Item",
    "Report",
    "check_host",
    "days_left",
    "device_names",
    "inspect",
    "load_devices",
    "make",
    "names_in_short",
    "renew",
    "sans",
]
