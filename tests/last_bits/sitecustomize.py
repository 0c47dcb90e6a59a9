"""Another processor, played: with this folder on PYTHONPATH, products of other shapes end in other last bits.

A matrix product of 4 rows adds up in another order than 4 products of 1 row: on some processors that changes
the last bits, on others it does not. Here it always does, and so does another number of threads, in every
Python that is started: a test that compares such results for equality fails on every machine. Run it with
`make test-last-bits`.
"""
import importlib.machinery
import sys

SHIFT = 2.0**-21  # relative, a few last bits of a float32


def play(torch):
    "Replace linear layers and convolutions of a torch that was just loaded."
    plain_linear = torch.nn.functional.linear
    plain_conv = torch.nn.Conv2d._conv_forward

    def shake(values, rows, dim):
        "Other last bits for each number of rows and of threads; the same ones when both are the same."
        name = rows * 7 + torch.get_num_threads() * 3
        channels = torch.arange(values.shape[dim], device=values.device)
        step = (channels * (name % 11 + 1) + name) % 5 - 2
        shape = [1] * values.ndim
        shape[dim] = -1
        return values * (1 + SHIFT * step.view(shape)).to(values.dtype)

    def linear(x, weight, bias=None):
        return shake(plain_linear(x, weight, bias), x.numel() // max(1, x.shape[-1]), -1)

    def conv(self, x, weight, bias):
        return shake(plain_conv(self, x, weight, bias), x.shape[0], 1)

    torch.nn.functional.linear = linear
    torch.nn.Conv2d._conv_forward = conv


class TorchFinder:
    "Finds torch as Python would, and plays the processor as soon as it is loaded."

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torch": return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None: return None
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            play(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, TorchFinder)
