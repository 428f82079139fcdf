# The image of every pipeline stage: locked dependencies in one virtual environment, nothing else.
# Build it from the repository's root: docker build -f docker/pipeline.Dockerfile -t highlights-pipeline:0.1.0 .

# Any Debian 12 with Python 3.11 and its venv module will do, so a base from a local mirror can stand in.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# torch's builds for CPU and for CUDA share a version, not a hash, so the lock leaves it out and the index
# decides: name torch's own CPU index for an image without CUDA's 5 GB. Empty: pip's default.
ARG TORCH_INDEX=
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
RUN PIP_INDEX_URL="${TORCH_INDEX}" pip install --no-cache-dir torch==2.13.0
COPY requirements/run.lock /build/requirements/run.lock
RUN pip install --no-cache-dir --no-deps --require-hashes -r /build/requirements/run.lock
# After the dependencies: a change of code alone leaves their layers as they are.
COPY README.md setup.cfg pyproject.toml /build/
COPY pipeline/ /build/pipeline/
COPY serving/ /build/serving/
# The build tool is in the lock too: nothing unpinned is fetched for it.
RUN pip install --no-cache-dir --no-deps --no-build-isolation /build

FROM ${PYTHON_IMAGE}
ARG REVISION=unknown
LABEL org.opencontainers.image.title="highlights-pipeline" \
      org.opencontainers.image.description="Highlight logs in, a served and measured ScaNN index out" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}"
# A name for the uid: libraries that ask who runs them fail on a uid without one. A new volume mounted on
# /data takes over its owner.
RUN groupadd --gid 10001 pipeline \
 && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp \
      --shell /usr/sbin/nologin pipeline \
 && install --directory --owner=10001 --group=10001 /data
COPY --from=build /opt/venv /opt/venv
COPY configs/ /app/configs/
# The root is read-only when it runs: all that libraries write outside the work folder goes to /tmp.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    TMPDIR=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /app
USER 10001:10001
# As process 1 Python would ignore SIGTERM; SIGINT ends it cleanly, and the next run goes on from there.
STOPSIGNAL SIGINT
ENTRYPOINT ["python", "-m", "pipeline"]
CMD ["--help"]
