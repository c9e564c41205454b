# The base: any that has Python 3.11 or newer as python3 will do. What builds has the same, and a C compiler.
FROM python:3.12-slim AS base

# Every library was locked with its hash (make lock) and comes as a wheel; the message path alone is compiled.
FROM python:3.12 AS build
WORKDIR /src
RUN python3 -m venv /opt/build && python3 -m venv --without-pip /opt/relay
COPY requirements.lock requirements-build.lock ./
RUN /opt/build/bin/pip --disable-pip-version-check install --no-cache-dir --require-hashes --only-binary :all: \
        -r requirements-build.lock \
    && /opt/build/bin/pip --disable-pip-version-check --python /opt/relay/bin/python3 \
        install --no-cache-dir --require-hashes --only-binary :all: -r requirements.lock
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY relay relay
RUN RELAY_COMPILE=always /opt/build/bin/pip --disable-pip-version-check wheel --no-build-isolation --no-deps --wheel-dir dist . \
    && /opt/build/bin/pip --disable-pip-version-check --python /opt/relay/bin/python3 \
        install --no-cache-dir --no-index --no-deps dist/*.whl
# What libraries bring for their own tests, for compilers, and for colouring source in a hundred languages.
RUN cd /opt/relay/lib/python3*/site-packages \
    && find . -type d \( -name tests -o -name testing \) -prune -exec rm -rf {} + \
    && find . -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.[ch]' -o -name '*.cpp' \) -delete \
    && find pygments/lexers -type f ! -name '__init__*' ! -name '_mapping*' -delete

FROM base
LABEL org.opencontainers.image.title="smtp-relay-record" \
      org.opencontainers.image.description="SMTP relay proxy that records sends" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --system --gid 10001 relay \
    && useradd --system --uid 10001 --gid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin relay \
    && install -d -o 10001 -g 10001 -m 0750 /data
COPY --from=build /opt/relay /opt/relay
COPY config/container.toml /etc/relay/relay.toml
ENV PATH=/opt/relay/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    RELAY_CONFIG=/etc/relay/relay.toml
WORKDIR /
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
VOLUME /data
EXPOSE 2525 9025
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s CMD ["relay", "health"]
ENTRYPOINT ["relay"]
CMD ["serve"]
