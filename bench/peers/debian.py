"""Peers from Debian's packages: Postfix, nginx, OpenSMTPD, Exim. All but nginx want root."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from bench.ends import tool
from bench.processes import ROOT

_UNPACKED = ROOT / ".peers" / "root" / "usr" / "sbin"
_NGINX_MODULES = Path("/usr/lib/nginx/modules")
LIMIT = 64 << 20
"""Octets of a message: the peers' own limits are below the large case's."""


def _program(name: str) -> str | None:
    unpacked = _UNPACKED / name
    return str(unpacked) if unpacked.exists() else tool(name)


def _missing(name: str, package: str) -> str | None:
    if _program(name) is None:
        return f"{package} is not installed"
    return None if os.getuid() == 0 else f"{package} can only be started by root"


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return (done.stdout or done.stderr).strip().splitlines()[0]


# Postfix

_POSTFIX_MAIN = """\
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
mail_owner = postfix
setgid_group = postdrop
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
myhostname = relay.bench
mydestination =
mynetworks = 127.0.0.0/8
relayhost = [127.0.0.1]:{sink_port}
disable_dns_lookups = yes
smtpd_peername_lookup = no
alias_maps =
local_recipient_maps =
smtpd_relay_restrictions = permit_mynetworks, reject
smtp_tls_security_level = none
message_size_limit = {limit}
mailbox_size_limit = 0
default_process_limit = 1200
initial_destination_concurrency = 20
default_destination_concurrency_limit = 200
in_flow_delay = 0
"""
_POSTFIX_MASTER = """\
127.0.0.1:{port} inet n - n - - smtpd {options}
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
proxymap unix - - n - - proxymap
smtp unix - - n - - smtp
relay unix - - n - - smtp
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
"""


def no_postfix() -> str | None:
    return _missing("postfix", "postfix")


def postfix_version() -> str:
    return "Postfix " + _said(tool("postconf") or "postconf", "-h", "mail_version")


def postfix(directory: Path, port: int, sink_port: int) -> list[str]:
    """Queueing: 250 after the fsync of its queue file."""
    return _postfix(directory, port, sink_port, "")


def postfix_proxy(directory: Path, port: int, sink_port: int) -> list[str]:
    """Before-queue: `smtpd_proxy_filter` passes each command on and keeps nothing."""
    return _postfix(directory, port, sink_port, f"-o smtpd_proxy_filter=127.0.0.1:{sink_port}")


def _postfix(directory: Path, port: int, sink_port: int, options: str) -> list[str]:
    _open_to_others(directory)
    etc = directory / "etc"
    for made in (etc, directory / "queue", directory / "data"):
        made.mkdir()
    shutil.chown(directory / "data", "postfix", "postfix")
    main = _POSTFIX_MAIN.format(directory=directory, sink_port=sink_port, limit=LIMIT)
    (etc / "main.cf").write_text(main, "ascii")
    (etc / "master.cf").write_text(_POSTFIX_MASTER.format(port=port, options=options), "ascii")
    # `start-fg` would leave a shell between us and the master, which does not pass the signal on.
    master = f"{_said('postconf', '-h', 'daemon_directory')}/master"
    return ["/bin/sh", "-c", f"postfix -c {etc} check && exec {master} -c {etc} -s"]


# nginx

_NGINX = """\
load_module {modules}/ngx_{module}_module.so;
daemon off;
user nobody nogroup;
worker_processes auto;
worker_rlimit_nofile 16384;
pid {directory}/pid;
error_log {directory}/error.log error;
events {{ worker_connections 8192; }}
{body}
"""
_STREAM = """\
stream {{
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    proxy_pass 127.0.0.1:{sink_port};
    tcp_nodelay on;
  }}
}}
"""
_MAIL = """\
http {{
  access_log off;
  client_body_temp_path {directory}/b; proxy_temp_path {directory}/p; fastcgi_temp_path {directory}/f;
  uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;
  server {{
    listen unix:{directory}/auth;
    location / {{
      add_header Auth-Status OK;
      add_header Auth-Server 127.0.0.1;
      add_header Auth-Port {sink_port};
      return 204;
    }}
  }}
}}
mail {{
  server_name relay.bench;
  auth_http unix:{directory}/auth:/;
  xclient off;
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    protocol smtp;
    smtp_auth none;
    timeout 300s;
    proxy_timeout 300s;
  }}
}}
"""


def _no_nginx(module: str) -> str | None:
    if not (_NGINX_MODULES / f"ngx_{module}_module.so").exists():
        return f"libnginx-mod-{module} is not installed"
    return _missing("nginx", "nginx")


def no_nginx_stream() -> str | None:
    return _no_nginx("stream")


def no_nginx_mail() -> str | None:
    return _no_nginx("mail")


def nginx_version() -> str:
    return _said(tool("nginx") or "nginx", "-v").removeprefix("nginx version: ")


def nginx_stream(directory: Path, port: int, sink_port: int) -> list[str]:
    """A blind pipe: the floor under any proxy."""
    return _nginx(directory, "stream", _STREAM.format(port=port, sink_port=sink_port))


def nginx_mail(directory: Path, port: int, sink_port: int) -> list[str]:
    """Speaks SMTP up to RCPT, then a pipe."""
    return _nginx(directory, "mail", _MAIL.format(directory=directory, port=port, sink_port=sink_port))


def _nginx(directory: Path, module: str, body: str) -> list[str]:
    _open_to_others(directory)
    text = _NGINX.format(modules=_NGINX_MODULES, module=module, directory=directory, body=body)
    config = directory / "nginx.conf"
    config.write_text(text, "ascii")
    program = tool("nginx") or "nginx"
    return [program, "-c", str(config), "-p", str(directory), "-e", str(directory / "error.log")]


# OpenSMTPD

_OPENSMTPD = """\
smtp max-message-size "64M"
smtp limit max-mails 1000000
{limits}
mta limit reconn-delay-route 0
listen on 127.0.0.1 port {port} hostname relay.bench
action "up" relay host smtp://127.0.0.1:{sink_port}
match from any for any action "up"
"""
_OPENSMTPD_SPOOL = Path("/var/spool/smtpd")


def no_opensmtpd() -> str | None:
    return _missing("smtpd", "opensmtpd")


def opensmtpd_version() -> str:
    return _said(_program("smtpd") or "smtpd", "-h").removeprefix("version: ")


def opensmtpd(directory: Path, port: int, sink_port: int) -> list[str]:
    """Queueing. Its queue and its listen backlog (5) are compiled in; it asks DNS for each client's name."""
    _open_to_others(directory)
    if _OPENSMTPD_SPOOL.exists() and (_UNPACKED / "smtpd").exists():
        shutil.rmtree(
            _OPENSMTPD_SPOOL
        )  # what an earlier run left; an installed one's queue is not ours to empty
    _OPENSMTPD_SPOOL.mkdir(mode=0o711, exist_ok=True)
    scopes = ("host", "route", "source", "connector", "relay", "domain")
    limits = [f"mta limit max-conn-per-{scope} 200" for scope in scopes]
    limits += [f"mta limit conn-delay-{scope} 0" for scope in scopes]
    config, resolver = directory / "smtpd.conf", directory / "resolv.conf"
    config.write_text(_OPENSMTPD.format(limits="\n".join(limits), port=port, sink_port=sink_port), "ascii")
    config.chmod(0o644)
    resolver.write_text("lookup file\nnameserver 127.0.0.1\n", "ascii")
    started = f"mount --bind {resolver} /etc/resolv.conf && exec {_program('smtpd')} -F -f {config}"
    return ["unshare", "-m", "/bin/sh", "-c", started]


# Exim

_EXIM = """\
primary_hostname = relay.bench
exim_path = {program}
exim_user = Debian-exim
exim_group = Debian-exim
deliver_drop_privilege = true
spool_directory = {directory}/spool
split_spool_directory = true
log_file_path = syslog
pid_file_path = {directory}/exim.pid
local_interfaces = 127.0.0.1
daemon_smtp_ports = {port}
disable_ipv6 = true
tls_advertise_hosts =
host_lookup =
rfc1413_hosts =
prdr_enable = false
smtp_accept_max = 0
smtp_accept_max_per_connection = 0
smtp_accept_queue_per_connection = 0
smtp_connect_backlog = 1024
message_size_limit = {limit}
check_spool_space = 0
check_spool_inodes = 0
acl_smtp_rcpt = acl_rcpt
acl_smtp_data = acl_data
begin acl
acl_rcpt:
  accept{control}
acl_data:
  accept
begin routers
smart:
  driver = manualroute
  route_list = * 127.0.0.1::{sink_port}
  self = send
  transport = up
begin transports
up:
  driver = smtp
  allow_localhost
  hosts_avoid_tls = *
begin retry
* * F,1h,5s
"""


def no_exim() -> str | None:
    return _missing("exim4", "exim4")


def exim_version() -> str:
    return " ".join(_said(_program("exim4") or "exim4", "-bV").split()[:3])


def exim(directory: Path, port: int, sink_port: int) -> list[str]:
    """Queueing, each message delivered at once by a process of its own."""
    return _exim(directory, port, sink_port, "")


def exim_cutthrough(directory: Path, port: int, sink_port: int) -> list[str]:
    """Delivers while it receives, and answers what the upstream answers."""
    return _exim(directory, port, sink_port, "\n  control = cutthrough_delivery")


def _exim(directory: Path, port: int, sink_port: int, control: str) -> list[str]:
    _open_to_others(directory)
    program = _program("exim4") or "exim4"
    (directory / "spool").mkdir()
    for mine in (directory, directory / "spool"):
        shutil.chown(mine, "Debian-exim", "Debian-exim")
    config = directory / "exim.conf"
    config.write_text(
        _EXIM.format(
            program=program, directory=directory, port=port, sink_port=sink_port, limit=LIMIT, control=control
        ),
        "ascii",
    )
    return [program, "-C", str(config), "-bdf", "-q10s"]


def _open_to_others(directory: Path) -> None:
    """Let peers that give up root reach their files."""
    directory.chmod(0o755)
    directory.parent.chmod(0o755)
