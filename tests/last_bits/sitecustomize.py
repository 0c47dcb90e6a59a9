"""Another processor, played: with this folder on PYTHONPATH, products of other shapes end in other last bits.

A matrix product of 4 rows adds up in another order than 4 products of 1 row: on some processors that changes the last
bits, on others it does not. Here it always does, and so does another number of threads, in every Python that is started:
a test that compares such results for equality fails on every machine. Run it with `make test-last-bits`.
"""
import torch
import torch.nn.functional as F

SHIFT = 2.0**-21  # relative, a few last bits of a float32

plain_linear = F.linear
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


F.linear = linear
torch.nn.Conv2d._conv_forward = conv
