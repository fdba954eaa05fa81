"""Learning rates for another configuration: conversion, and suggestion without any run."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
