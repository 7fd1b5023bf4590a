# syntax=docker/dockerfile:1
# Tuanyuan's flow and command line. `make image-steps` plays these steps without a container engine.

# ---- build: everything that is installed, with locked hashes, into /opt/tuanyuan
FROM python:3.12-slim AS build
ENV INSTALLER=/opt/installer \
    PREFIX=/opt/tuanyuan \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY requirements/build.txt requirements/run.txt requirements/
# The installer (pip, the build backend) stays behind in this stage.
RUN python -m venv "$INSTALLER" \
    && "$INSTALLER/bin/pip" install --require-hashes --only-binary :all: -r requirements/build.txt \
    && python -m venv --without-pip "$PREFIX" \
    && "$INSTALLER/bin/pip" --python "$PREFIX/bin/python" install \
        --require-hashes --only-binary :all: -r requirements/run.txt \
    # A quarter of it is never read: the libraries' own tests, and all lists of places but the one that loadtest uses.
    && find "$PREFIX" -depth -type d -name tests -exec rm -r {} + \
    && find "$PREFIX" -name 'cities*.json' ! -name cities500.json -delete
COPY pyproject.toml LICENSE ./
COPY geoindex geoindex
COPY flows flows
COPY gateway gateway
COPY loadtest loadtest
COPY tuanyuan tuanyuan
RUN "$INSTALLER/bin/pip" wheel --no-index --no-deps --no-build-isolation --wheel-dir dist . \
    && "$INSTALLER/bin/pip" --python "$PREFIX/bin/python" install --no-index --no-deps dist/*.whl

# ---- the processor that kernels are compiled for: the machine that builds an image is not the one that runs it.
# v3 is every x86-64 server since 2015. For one kind of machine, name it: --build-arg KERNEL_CPU=znver4
FROM python:3.12-slim AS base-amd64
ARG KERNEL_CPU=x86-64-v3
ENV NUMBA_CPU_NAME=$KERNEL_CPU \
    NUMBA_CPU_FEATURES=""

FROM python:3.12-slim AS base-arm64
ARG KERNEL_CPU=generic
ENV NUMBA_CPU_NAME=$KERNEL_CPU \
    NUMBA_CPU_FEATURES=""

# ---- run
# hadolint ignore=DL3006
FROM base-${TARGETARCH}
RUN groupadd --gid 10001 tuanyuan \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin tuanyuan \
    && install -d -o 10001 -g 10001 /var/cache/tuanyuan /var/lib/tuanyuan
COPY --from=build /opt/tuanyuan /opt/tuanyuan
ENV PATH=/opt/tuanyuan/bin:$PATH \
    NUMBA_CACHE_DIR=/var/cache/tuanyuan \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /var/lib/tuanyuan
# Numba uses a cache directory only if it can write there: it belongs to the user who runs.
RUN tuanyuan warmup
# As Ctrl-C: a Python process that is number 1 does not hear SIGTERM.
STOPSIGNAL SIGINT
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s --retries=3 CMD ["tuanyuan", "health"]
ENTRYPOINT ["tuanyuan"]
CMD ["run"]
