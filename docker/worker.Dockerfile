# The image of a Beam worker on Flink, Spark or Dataflow: the pipeline's image with Beam's boot program in it.
# Build it after the pipeline's: docker build -f docker/worker.Dockerfile -t highlights-worker:0.1.0 .

ARG PIPELINE_IMAGE=highlights-pipeline:0.1.0
# The very version of apache-beam in the lock: boot and SDK speak to each other.
FROM apache/beam_python3.11_sdk:2.77.0 AS beam

FROM ${PIPELINE_IMAGE}
# gcp or aws, where logs or pairs.temp_location lie in a bucket; Beam itself stays at the locked version.
ARG BEAM_EXTRAS=
USER 0:0
RUN test -z "${BEAM_EXTRAS}" || /opt/venv/bin/pip install --no-cache-dir "apache-beam[${BEAM_EXTRAS}]==2.77.0"
COPY --from=beam /opt/apache/beam /opt/apache/beam
# Without it boot makes an environment of its own, where this user cannot write.
ENV RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1
USER 10001:10001
ENTRYPOINT ["/opt/apache/beam/boot"]
