# syntax=docker/dockerfile:1
# jddist on CPUs, from the clone:
#
#   docker build -f docker/cpu.Dockerfile -t jddist:cpu .
#   docker run --rm jddist:cpu                                             # the selftest
#   docker run --rm jddist:cpu bash launch/torchrun.sh --nproc 2 examples/digits.py --smoke
#
# For builds that always start from the same bytes, add the digest that your registry shows:
#   --build-arg PYTHON_IMAGE=python:3.11.13-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# Where torch comes from; empty: from pip's own configuration.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=examples,monitoring
WORKDIR /src
RUN python -m venv /opt/jddist
ENV PATH=/opt/jddist/bin:$PATH
COPY constraints.txt ./
# torch first and by itself: it changes least, and no other build of it can come in later.
RUN --mount=type=cache,target=/root/.cache/pip \
    grep '^torch==' constraints.txt > torch.txt \
    && pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r torch.txt
COPY pyproject.toml README.md LICENSE ./
COPY jddist jddist
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt ".[${EXTRAS}]"

FROM ${PYTHON_IMAGE}
# torch.compile needs a compiler. Not pinned: Debian removes old versions from its mirrors, and the
# base image's digest fixes the rest.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --user-group --create-home jddist \
    && install --directory --owner=jddist --group=jddist /workspace
COPY --from=build /opt/jddist /opt/jddist
WORKDIR /workspace
COPY --chown=jddist:jddist examples examples
COPY --chown=jddist:jddist launch launch
ENV PATH=/opt/jddist/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib
# By number, so that Kubernetes can see that it is not root.
USER 10001
# On the CPU and apart from the ranks of a training job, which it would disturb otherwise.
HEALTHCHECK --interval=10m --timeout=3m --start-period=1m --retries=2 \
    CMD ["python", "-m", "jddist.selftest", "--alone", "--backend", "gloo", "--wrappers", "ddp"]
CMD ["python", "-m", "jddist.selftest"]
