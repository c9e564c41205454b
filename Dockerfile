# syntax=docker/dockerfile:1
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md ./
COPY relay relay
RUN python -m venv /opt/relay \
    && /opt/relay/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt .

FROM python:3.12-slim
RUN useradd --system --uid 10001 --home-dir /data --shell /usr/sbin/nologin relay \
    && install -d -o relay -g relay -m 0750 /data
COPY --from=build /opt/relay /opt/relay
COPY config/relay.toml /etc/relay/relay.toml
# Set the upstream with RELAY__UPSTREAMS__0__ADDRESS, who may relay with RELAY__CLIENTS__ALLOW; or mount a file.
ENV PATH=/opt/relay/bin:$PATH \
    RELAY_CONFIG=/etc/relay/relay.toml \
    RELAY__LISTENERS__0__ADDRESS=0.0.0.0:2525 \
    RELAY__HTTP__ADDRESS=0.0.0.0:9025 \
    RELAY__RECORDS__URL=sqlite:////data/task_done.db \
    RELAY__RECORDS__SPOOL=/data/spool
WORKDIR /data
USER relay
VOLUME /data
EXPOSE 2525 9025
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=3s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9025/healthz', timeout=2)"]
ENTRYPOINT ["relay"]
CMD ["serve"]
