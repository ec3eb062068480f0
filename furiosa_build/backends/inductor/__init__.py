"""The inductor backend: AOTInductor on the CPU."""

from furiosa_build.backends.inductor.backend import InductorBackend as InductorBackend
