"""What ``python -m rsengine.gpu_check`` runs.

``parts`` lists the parts and their rows, ``runner`` gives each part a process and each row a limit, ``worker`` is that
process, and ``report`` writes what was found. The other modules measure; each has ``measure(row, setup)``, which
returns a dictionary that JSON can hold. What needs a device goes through
:class:`~rsengine.checks.gpu.device.Device`, so that the tests run the same code on a stand-in.
"""
