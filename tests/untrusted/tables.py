"""Damage to an expert table: functions of (neurons, offsets), each giving tables that must be refused."""


def swapped(neurons, offsets):
    neurons[[0, 1]] = neurons[[1, 0]]
    return neurons, offsets


def repeated(neurons, offsets):
    neurons[1] = neurons[0]
    return neurons, offsets


def above(neurons, offsets):
    neurons[int(offsets[1]) - 1] = 2**30
    return neurons, offsets


def below(neurons, offsets):
    neurons[0] = -1
    return neurons, offsets


def falling(neurons, offsets):
    offsets[1] = offsets[2] + 1
    return neurons, offsets


def short(neurons, offsets):
    offsets[-1] -= 1
    return neurons, offsets


def none(neurons, offsets):
    return neurons[:0], offsets


TABLE_DAMAGE = [swapped, repeated, above, below, falling, short, none]
