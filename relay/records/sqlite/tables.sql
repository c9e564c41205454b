CREATE TABLE task_done_version (
	version_num VARCHAR(32) NOT NULL,
	CONSTRAINT task_done_version_pkc PRIMARY KEY (version_num)
);
CREATE TABLE task_done (
	id INTEGER NOT NULL,
	task_id TEXT NOT NULL,
	client_task_id TEXT,
	task_type TEXT NOT NULL,
	sender TEXT NOT NULL,
	sender_domain TEXT NOT NULL,
	client TEXT NOT NULL,
	sent_at DATETIME NOT NULL,
	expires_at DATETIME,
	upstream TEXT NOT NULL,
	upstream_reply TEXT NOT NULL,
	message_id TEXT,
	size BIGINT NOT NULL,
	duration_ms BIGINT NOT NULL,
	data JSON NOT NULL,
	PRIMARY KEY (id),
	CONSTRAINT uq_task_done_task_id UNIQUE (task_id)
);
CREATE TABLE task_done_recipient (
	task_done_id INTEGER NOT NULL,
	ordinal INTEGER NOT NULL,
	recipient TEXT NOT NULL,
	recipient_domain TEXT NOT NULL,
	sent_at DATETIME NOT NULL,
	CONSTRAINT pk_task_done_recipient PRIMARY KEY (task_done_id, ordinal),
	CONSTRAINT fk_task_done_recipient_task_done_id FOREIGN KEY(task_done_id) REFERENCES task_done (id) ON DELETE CASCADE
)
 WITHOUT ROWID;
CREATE TABLE task_done_state (
	name TEXT NOT NULL,
	value TEXT NOT NULL,
	expires_at DATETIME,
	PRIMARY KEY (name)
);
CREATE INDEX ix_task_done_sender ON task_done (lower(sender), sent_at);
CREATE INDEX ix_task_done_sender_domain ON task_done (sender_domain, sent_at);
CREATE INDEX ix_task_done_client ON task_done (client, sent_at);
CREATE INDEX ix_task_done_task_type ON task_done (task_type, sent_at);
CREATE INDEX ix_task_done_message_id ON task_done (message_id) WHERE message_id IS NOT NULL;
CREATE INDEX ix_task_done_client_task_id ON task_done (client_task_id) WHERE client_task_id IS NOT NULL;
CREATE INDEX ix_task_done_expires_at ON task_done (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX ix_task_done_recipient_recipient ON task_done_recipient (lower(recipient), sent_at);
CREATE INDEX ix_task_done_recipient_recipient_domain ON task_done_recipient (recipient_domain, sent_at);
CREATE VIEW task_done_send AS SELECT t.id, t.task_id, t.client_task_id, t.task_type, t.sender, t.sender_domain, t.client, t.sent_at, t.expires_at, t.upstream, t.upstream_reply, t.message_id, t.size, t.duration_ms, t.data, r.ordinal, r.recipient, r.recipient_domain FROM task_done AS t JOIN task_done_recipient AS r ON r.task_done_id = t.id;
CREATE INDEX ix_task_done_sent_at ON task_done (sent_at);
CREATE TABLE task_in_doubt (
	id INTEGER NOT NULL,
	task_id TEXT NOT NULL,
	client_task_id TEXT,
	task_type TEXT NOT NULL,
	sender TEXT NOT NULL,
	sender_domain TEXT NOT NULL,
	client TEXT NOT NULL,
	since DATETIME NOT NULL,
	expires_at DATETIME,
	upstream TEXT NOT NULL,
	reason TEXT NOT NULL,
	message_id TEXT,
	size BIGINT NOT NULL,
	duration_ms BIGINT NOT NULL,
	recipients JSON NOT NULL,
	data JSON NOT NULL,
	PRIMARY KEY (id),
	CONSTRAINT uq_task_in_doubt_task_id UNIQUE (task_id)
);
CREATE INDEX ix_task_in_doubt_since ON task_in_doubt (since);
CREATE INDEX ix_task_in_doubt_expires_at ON task_in_doubt (expires_at) WHERE expires_at IS NOT NULL;
CREATE VIEW task_done_by_hour AS SELECT strftime('%Y-%m-%d %H:00:00', sent_at) AS hour,
    count(*) AS messages,
    sum((SELECT count(*) FROM task_done_recipient WHERE task_done_id = task_done.id)) AS recipients,
    sum(size) AS octets,
    avg(duration_ms) AS average_ms,
    max(duration_ms) AS slowest_ms,
    max(sent_at) AS last_sent_at
 FROM task_done GROUP BY strftime('%Y-%m-%d %H:00:00', sent_at);
CREATE VIEW task_done_by_type AS SELECT task_type,
    count(*) AS messages,
    sum((SELECT count(*) FROM task_done_recipient WHERE task_done_id = task_done.id)) AS recipients,
    sum(size) AS octets,
    avg(duration_ms) AS average_ms,
    max(duration_ms) AS slowest_ms,
    max(sent_at) AS last_sent_at
 FROM task_done GROUP BY task_type;
CREATE VIEW task_done_by_sender AS SELECT lower(sender) AS sender,
    count(*) AS messages,
    sum((SELECT count(*) FROM task_done_recipient WHERE task_done_id = task_done.id)) AS recipients,
    sum(size) AS octets,
    avg(duration_ms) AS average_ms,
    max(duration_ms) AS slowest_ms,
    max(sent_at) AS last_sent_at
 FROM task_done GROUP BY lower(sender);
CREATE VIEW task_done_by_recipient_domain AS SELECT recipient_domain, count(DISTINCT task_done_id) AS messages, count(*) AS recipients, max(sent_at) AS last_sent_at FROM task_done_recipient GROUP BY recipient_domain;
CREATE TRIGGER task_done_with_its_recipients AFTER DELETE ON task_done BEGIN DELETE FROM task_done_recipient WHERE task_done_id = OLD.id; END;
INSERT INTO task_done_version VALUES ('0005');
