-- This schema guarantees that every committed change of a user has a version, a time and an event,
-- and is included in the total, whoever makes the change. Triggers enforce it. Writers need
-- privileges on users only, and no session setting affects it except session_replication_role =
-- replica.
--
-- When the service starts, it runs the steps below in order. Only one replica at a time does so.
-- Each step is a transaction with search_path set to this schema only. A step takes strong locks
-- on existing tables only if something is missing, and waits at most 200 ms for them. After that
-- it is rolled back and retried, so that requests do not queue behind it. If the schema is
-- complete, the steps replace the functions with identical ones and change nothing else.
--
-- To change the schema, add a step before the last one, state in its comment whether the previous
-- release can run on it, and increment the version in user_service_schema and in step 0.
--
-- The service handles these error codes: US001 the database cannot be used, US002 skip the
-- remaining steps, US100 the schema was repaired, US101 a new version was installed.

-- Step 0: refuse a database that the service cannot use. This step changes nothing.
DO $$
DECLARE
    installed int; -- installed version of the schema
    oldest    int;
    existing  record;
BEGIN
    IF current_schema() IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'US001',
            MESSAGE = 'search_path names no schema that exists',
            HINT = 'Create the schema, or name another one: ALTER ROLE ... SET search_path = ...';
    END IF;
    IF current_setting('server_encoding') NOT IN ('UTF8', 'SQL_ASCII') THEN
        RAISE EXCEPTION USING ERRCODE = 'US001',
            MESSAGE = 'the encoding of the database is ' || current_setting('server_encoding')
                || ', which cannot store every name',
            HINT = 'Create a database with ENCODING ''UTF8''';
    END IF;
    IF to_regprocedure('user_service_schema()') IS NOT NULL THEN
        SELECT * INTO installed, oldest FROM user_service_schema();
        IF oldest > 2 THEN
            RAISE EXCEPTION USING ERRCODE = 'US001',
                MESSAGE = format('the schema has version %s, and this release knows versions up to 2',
                    installed),
                HINT = 'Run a newer release';
        ELSIF installed > 2 THEN
            RAISE EXCEPTION 'a newer schema that this release can use' USING ERRCODE = 'US002';
        END IF;
    END IF;

    FOR existing IN
        -- Each column is listed with its type category: N(umeric), S(tring), D(ate/time),
        -- U(ser-defined).
        SELECT format('%s.%s', current_schema(), name) AS name, relkind, relowner, (
            SELECT string_agg(split_part(needed, ' ', 1), ', ' ORDER BY needed)
            FROM unnest(columns) AS needed
            WHERE needed NOT IN (
                SELECT attname || ' ' || typcategory::text
                FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
                WHERE attrelid = pg_class.oid AND attnum > 0
            )
        ) AS missing
        FROM (VALUES
            ('users', '{id N, name S, surname S, password S, version N, created_at D, updated_at D}'::text[]),
            ('outbox', '{id N, event_id U, event_type S, user_id N, version N, trace_id S, occurred_at D}'),
            ('idempotency_keys', '{key S, user_id N, name S, surname S, password S, created_at D}'),
            ('user_counts', '{n N}'),
            ('relay_lease', '{holder S, until D}')
        ) AS ours (name, columns)
        LEFT JOIN pg_class ON pg_class.oid = to_regclass(name)
    LOOP
        IF existing.relkind IS NULL THEN
            IF installed IS NOT NULL THEN
                RAISE WARNING 'created the table %', existing.name USING ERRCODE = 'US100';
            END IF;
        ELSIF existing.relkind NOT IN ('r', 'p') OR existing.missing IS NOT NULL THEN
            RAISE EXCEPTION USING ERRCODE = 'US001',
                MESSAGE = existing.name || ' is not the table of this service: '
                    || coalesce('it has no column, or one of another type, ' || existing.missing,
                        'it is no table'),
                HINT = 'Give this service a database, or by search_path a schema, of its own';
        ELSIF NOT pg_has_role(existing.relowner, 'USAGE') THEN
            RAISE EXCEPTION USING ERRCODE = 'US001',
                MESSAGE = format('the table %s belongs to the role %s, not to %s',
                    existing.name, pg_get_userbyid(existing.relowner), current_user),
                HINT = 'Connect as the owner of the tables, or change it: ALTER TABLE ... OWNER TO ...';
        END IF;
    END LOOP;
END
$$;

-- Step 1: create tables and functions. If the release of commit c223611 has created users, outbox,
-- idempotency_keys and user_counts, these tables stay unchanged until step 2. That release can run
-- on this step.

CREATE TABLE IF NOT EXISTS users (
    id         bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
    name       text        NOT NULL,
    surname    text        NOT NULL,
    password   text        NOT NULL,               -- argon2id hash as a PHC string
    version    bigint      NOT NULL DEFAULT 1,     -- incremented by each change
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

-- user_service_uuid returns a UUID v7 (RFC 9562 section 5.7). It takes a UUID v4, replaces the
-- first 48 bits by the Unix time in milliseconds, and sets the version bits to 7.
CREATE OR REPLACE FUNCTION user_service_uuid() RETURNS uuid LANGUAGE sql VOLATILE AS $$
    SELECT encode(set_bit(set_bit(overlay(uuid_send(gen_random_uuid())
        PLACING substring(int8send((date_part('epoch', clock_timestamp()) * 1000)::bigint) FROM 3)
        FROM 1 FOR 6), 52, 1), 53, 1), 'hex')::uuid
$$;

-- outbox contains the events of committed changes that the broker has not confirmed yet. It is
-- empty when all events are published. For one user, the order of ids is the order of versions,
-- because an id is assigned while the user's row is locked. Across users, the order of ids is not
-- the order of commits, so a reader must not use an id as its position.
CREATE TABLE IF NOT EXISTS outbox (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id    uuid        NOT NULL DEFAULT user_service_uuid(),
    event_type  text        NOT NULL,
    user_id     bigint      NOT NULL,
    version     bigint      NOT NULL,
    trace_id    text        NOT NULL,
    occurred_at timestamptz NOT NULL
) WITH ( -- rows are deleted after milliseconds, so vacuum early and without delay
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold    = 1000,
    autovacuum_vacuum_cost_delay   = 0
);

-- idempotency_keys records the users that were created with an Idempotency-Key, with the values of
-- the request. If the request had an API key, key begins with the API key's name and a tab. Rows
-- are deleted after 24 hours.
CREATE TABLE IF NOT EXISTS idempotency_keys (
    key        text        PRIMARY KEY,
    user_id    bigint      NOT NULL,
    name       text        NOT NULL,
    surname    text        NOT NULL,
    password   text        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- The total number of users is the sum of n. Each statement that inserts or deletes users inserts a
-- row here, so that writers do not wait for each other. The replicas regularly replace the rows
-- with a single one. The table always has a row, because the release of commit c223611 needs one.
CREATE TABLE IF NOT EXISTS user_counts (
    n bigint NOT NULL
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold    = 1000,
    autovacuum_vacuum_cost_delay   = 0
);

-- relay_lease names the replica that relays events, and when its lease expires by the database's
-- clock. It has one row after the first replica has requested the lease. It has no primary key,
-- because a restore may add an older row. See outbox.go.
CREATE TABLE IF NOT EXISTS relay_lease (
    holder text        NOT NULL,
    until  timestamptz NOT NULL
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold    = 1000,
    autovacuum_vacuum_cost_delay   = 0
);

-- user_service_stamp sets version and updated_at when a user is updated. A change of any other
-- column creates a new version, except when an unchanged password is hashed again. The value of a
-- stored generated column is not computed yet at this point, so in a table with such a column every
-- update counts as a change.
--
-- The rows are compared as a whole, because a session caches the types of the columns that a
-- function uses, and the function fails after ALTER TABLE ... ALTER COLUMN ... TYPE. If that
-- happens to id, version or updated_at, the service opens a new session.
CREATE OR REPLACE FUNCTION user_service_stamp() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.id <> OLD.id THEN
        RAISE EXCEPTION 'the id of a user never changes'
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    NEW.version := OLD.version;
    NEW.updated_at := OLD.updated_at;
    IF NEW *<> OLD AND (current_setting('user_service.rehash', true) IS DISTINCT FROM 'on'
        OR to_jsonb(NEW) - 'password' <> to_jsonb(OLD) - 'password')
    THEN
        NEW.version := OLD.version + 1;
        NEW.updated_at := greatest(clock_timestamp(), OLD.updated_at + interval '1 microsecond');
    END IF;
    RETURN NEW;
END
$$;

-- user_service_record writes the events of a statement and its effect on the total.
--
-- The trace id is the setting user_service.trace_id. If one statement makes the changes of several
-- requests, it is the element of user_service.trace_ids at the index of the user's id in
-- user_service.ids. If user_service.trace_id is not set or not valid in an HTTP or AMQP header, a
-- new UUID takes its place.
--
-- A session caches query plans. The plan of EXCEPT is suitable for one row and for a million rows,
-- whereas the cached plan of a join could be a nested loop.
CREATE OR REPLACE FUNCTION user_service_record() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    ids    bigint[] := nullif(current_setting('user_service.ids', true), '');
    traces text[]   := nullif(current_setting('user_service.trace_ids', true), '');
    trace  text     := current_setting('user_service.trace_id', true);
BEGIN
    IF trace IS NULL OR trace !~ '^[A-Za-z0-9._:-]{1,128}$' THEN
        trace := gen_random_uuid();
    END IF;
    CASE TG_OP
    WHEN 'INSERT' THEN
        INSERT INTO outbox (event_type, user_id, version, occurred_at, trace_id)
        SELECT 'user.created', id, version, greatest(updated_at, now()),
            coalesce(traces[array_position(ids, id)], trace)
        FROM inserted;
        INSERT INTO user_counts (n) SELECT count(*) FROM inserted HAVING count(*) > 0;
        -- The writer has set ids: move the sequence past them before the commit, so that no other
        -- writer gets one of these ids and waits for this transaction.
        PERFORM setval(sequence::regclass, highest)
        FROM pg_get_serial_sequence('users', 'id') AS sequence,
            (SELECT max(id) AS highest FROM inserted WHERE id < 9223372036854775807) AS chosen
        WHERE highest > coalesce(pg_sequence_last_value(sequence::regclass), 0);
    WHEN 'UPDATE' THEN
        INSERT INTO outbox (event_type, user_id, version, occurred_at, trace_id)
        SELECT 'user.updated', id, version, updated_at,
            coalesce(traces[array_position(ids, id)], trace)
        FROM (
            SELECT id, version, updated_at FROM updated EXCEPT
            SELECT id, version, updated_at FROM before
        ) AS changed;
    WHEN 'DELETE' THEN
        INSERT INTO outbox (event_type, user_id, version, occurred_at, trace_id)
        SELECT 'user.deleted', id, version + 1,
            greatest(clock_timestamp(), updated_at + interval '1 microsecond'),
            coalesce(traces[array_position(ids, id)], trace)
        FROM deleted;
        INSERT INTO user_counts (n) SELECT -count(*) FROM deleted HAVING count(*) > 0;
    WHEN 'TRUNCATE' THEN
        INSERT INTO outbox (event_type, user_id, version, occurred_at, trace_id)
        SELECT 'user.deleted', id, version + 1,
            greatest(clock_timestamp(), updated_at + interval '1 microsecond'), trace
        FROM users;
        INSERT INTO user_counts (n) SELECT -count(*) FROM users HAVING count(*) > 0;
        PERFORM set_config('user_service.highest_id', greatest(max(id),
            pg_sequence_last_value(pg_get_serial_sequence('users', 'id')::regclass))::text, true)
        FROM users WHERE id < 9223372036854775807;
    END CASE;
    RETURN NULL;
END
$$;

-- user_service_keep_ids prevents the reuse of user ids after TRUNCATE ... RESTART IDENTITY.
-- Consumers would drop version 1 of a user of whom they have seen later versions.
CREATE OR REPLACE FUNCTION user_service_keep_ids() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    highest bigint := nullif(current_setting('user_service.highest_id', true), '');
    next    bigint := nextval(pg_get_serial_sequence('users', 'id'));
BEGIN
    PERFORM setval(pg_get_serial_sequence('users', 'id'), highest) WHERE highest >= next;
    RETURN NULL;
END
$$;

-- user_service_adopt drops the event that the release of commit c223611 writes itself, because
-- user_service_record writes the event of the change. It passes the trace id on to that function.
CREATE OR REPLACE FUNCTION user_service_adopt() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('user_service.ids', array_append(
            nullif(current_setting('user_service.ids', true), '')::bigint[], NEW.user_id)::text, true),
        set_config('user_service.trace_ids', array_append(
            nullif(current_setting('user_service.trace_ids', true), '')::text[], NEW.trace_id)::text, true);
    RETURN NULL;
END
$$;

-- Step 2: create the triggers. The release of commit c223611 can run on this step: the columns that
-- its statements use are unchanged, its events are replaced by those of the triggers, and its own
-- triggers for the total do nothing any more. Requests of either release may wait up to 200 ms here.
DO $$
DECLARE
    missing record;
    code    text := CASE WHEN to_regprocedure('user_service_schema()') IS NULL
        THEN '01000' ELSE 'US100' END;
BEGIN
    FOR missing IN
        SELECT * FROM (VALUES
            ('users', 'user_service_stamp',
                'BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION user_service_stamp()'),
            ('users', 'user_service_insert', 'AFTER INSERT ON users
                REFERENCING NEW TABLE AS inserted
                FOR EACH STATEMENT EXECUTE FUNCTION user_service_record()'),
            ('users', 'user_service_update', 'AFTER UPDATE ON users
                REFERENCING OLD TABLE AS before NEW TABLE AS updated
                FOR EACH STATEMENT EXECUTE FUNCTION user_service_record()'),
            ('users', 'user_service_delete', 'AFTER DELETE ON users
                REFERENCING OLD TABLE AS deleted
                FOR EACH STATEMENT EXECUTE FUNCTION user_service_record()'),
            ('users', 'user_service_truncate', 'BEFORE TRUNCATE ON users
                FOR EACH STATEMENT EXECUTE FUNCTION user_service_record()'),
            ('users', 'user_service_keep_ids', 'AFTER TRUNCATE ON users
                FOR EACH STATEMENT EXECUTE FUNCTION user_service_keep_ids()'),
            ('outbox', 'user_service_adopt', 'BEFORE INSERT ON outbox FOR EACH ROW
                WHEN (pg_trigger_depth() = 0
                    AND NEW.event_type IN (''user.created'', ''user.updated'', ''user.deleted''))
                EXECUTE FUNCTION user_service_adopt()')
        ) AS needed (relation, name, definition)
        WHERE NOT EXISTS (
            SELECT FROM pg_trigger
            WHERE tgrelid = to_regclass(relation) AND tgname = name AND tgenabled IN ('O', 'A')
        )
    LOOP
        EXECUTE format('CREATE OR REPLACE TRIGGER %I %s', missing.name, missing.definition);
        RAISE WARNING 'created the trigger % of %', missing.name, missing.relation
            USING ERRCODE = code;
    END LOOP;

    -- users is locked, so none of the old triggers is running from here on.
    IF EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'users'::regclass
        AND tgname = 'count_inserted' AND tgfoid = to_regprocedure('count_users()'))
    THEN
        CREATE OR REPLACE FUNCTION count_users() RETURNS trigger LANGUAGE plpgsql
            AS 'BEGIN RETURN NULL; END';
    END IF;
    IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'user_counts'::regclass AND attname = 'shard')
    THEN
        ALTER TABLE user_counts DROP COLUMN shard;
        ALTER TABLE user_counts RESET (fillfactor);
    END IF;
    IF NOT EXISTS (
        SELECT FROM pg_attribute
        WHERE attrelid = 'outbox'::regclass AND attname = 'event_id' AND atthasdef
    ) THEN
        ALTER TABLE outbox ALTER event_id SET DEFAULT user_service_uuid();
        RAISE WARNING 'created the default of event_id of outbox' USING ERRCODE = code;
    END IF;
END
$$;

-- Step 3: add missing constraints and defaults, and drop the old triggers. The release of commit
-- c223611 can run on this step. The CHECK constraints are NOT VALID, so existing rows need not meet
-- them.
DO $$
DECLARE
    missing record;
    code    text := CASE WHEN to_regprocedure('user_service_schema()') IS NULL
        THEN '01000' ELSE 'US100' END;
BEGIN
    FOR missing IN
        SELECT relation, 'primary key' AS what, format('ADD PRIMARY KEY (%I)', key) AS ddl
        FROM (VALUES ('users', 'id'), ('outbox', 'id'), ('idempotency_keys', 'key')) AS keys (relation, key)
        WHERE NOT EXISTS (
            SELECT FROM pg_constraint WHERE conrelid = relation::regclass AND contype = 'p')
        UNION ALL
        SELECT relation, 'identity of id',
            'ALTER id DROP DEFAULT, ALTER id SET NOT NULL, ALTER id ADD GENERATED ' || kind || ' AS IDENTITY'
        FROM (VALUES ('users', 'BY DEFAULT'), ('outbox', 'ALWAYS')) AS identities (relation, kind)
        WHERE pg_get_serial_sequence(relation, 'id') IS NULL
        UNION ALL
        SELECT relation, 'default of ' || name, format('ALTER %I SET DEFAULT %s', name, value)
        FROM (VALUES
            ('users', 'version', '1'), ('users', 'created_at', 'now()'), ('users', 'updated_at', 'now()'),
            ('idempotency_keys', 'created_at', 'now()')
        ) AS defaults (relation, name, value)
        JOIN pg_attribute ON attrelid = relation::regclass AND attname = name AND NOT atthasdef
        UNION ALL
        SELECT relation, 'NOT NULL of ' || name, format('ALTER %I SET NOT NULL', name)
        FROM (VALUES ('users')) AS users (relation),
            unnest('{name, surname, password, version, created_at, updated_at}'::text[]) AS name
        JOIN pg_attribute ON attrelid = 'users'::regclass AND attname = name AND NOT attnotnull
        UNION ALL
        SELECT 'users', 'check ' || name, format('ADD CONSTRAINT %I CHECK (%s) NOT VALID', name, condition)
        FROM (VALUES
            ('user_service_id', 'id > 0 AND version > 0'),
            ('user_service_times', $check$
                created_at >= '0001-01-01 00:00Z' AND created_at < '10000-01-01 00:00Z'
                AND updated_at >= '0001-01-01 00:00Z' AND updated_at < '10000-01-01 00:00Z'$check$)
        ) AS checks (name, condition)
        WHERE NOT EXISTS (
            SELECT FROM pg_constraint WHERE conrelid = 'users'::regclass AND conname = name)
    LOOP
        EXECUTE format('ALTER TABLE %I %s', missing.relation, missing.ddl);
        RAISE WARNING 'created the % of %', missing.what, missing.relation USING ERRCODE = code;
    END LOOP;
    IF EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'users'::regclass
        AND tgname = 'count_inserted' AND tgfoid = to_regprocedure('count_users()'))
    THEN
        DROP TRIGGER count_inserted ON users;
        DROP TRIGGER IF EXISTS count_deleted ON users;
        DROP TRIGGER IF EXISTS count_truncated ON users;
        IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgfoid = to_regprocedure('count_users()')) THEN
            DROP FUNCTION count_users();
        END IF;
    END IF;
END
$$;

-- Step 4: repair the data. It moves sequences past the ids in use, corrects the total, and installs
-- the version, which means that all steps are complete. Correcting the total needs no lock: a
-- change and its row in user_counts become visible together, so a snapshot that does not include a
-- change does not include its row either.
DO $$
DECLARE
    relation text;
    sequence text;
    highest  bigint;
    next     bigint;
    missing  bigint;
    code     text := CASE WHEN to_regprocedure('user_service_schema()') IS NULL
        THEN '01000' ELSE 'US100' END;
BEGIN
    FOREACH relation IN ARRAY '{users, outbox}'::text[] LOOP
        sequence := pg_get_serial_sequence(relation, 'id');
        EXECUTE format('SELECT max(id) FROM %I WHERE id < 9223372036854775807', relation) INTO highest;
        EXECUTE format('SELECT last_value + is_called::int FROM %s', sequence) INTO next;
        IF highest >= next THEN
            PERFORM setval(sequence, highest);
            RAISE WARNING 'moved the sequence of %.id from % behind %', relation, next, highest
                USING ERRCODE = code;
        END IF;
    END LOOP;

    INSERT INTO user_counts (n)
    SELECT n FROM (
        SELECT (SELECT count(*) FROM users) - coalesce(sum(n), 0) AS n FROM user_counts
    ) AS difference
    WHERE n <> 0 OR NOT EXISTS (SELECT FROM user_counts)
    RETURNING n INTO missing;
    IF missing <> 0 THEN
        RAISE WARNING 'corrected the total by %', missing USING ERRCODE = code;
    END IF;

    IF to_regprocedure('user_service_schema()') IS NULL THEN
        RAISE WARNING 'installed version 2' USING ERRCODE = 'US101';
    END IF;
END
$$;

-- user_service_schema returns the version of the schema, and the oldest version that a release must
-- know to use it. It is a function and not a row so that a dump of the schema alone includes it.
CREATE OR REPLACE FUNCTION user_service_schema(OUT version int, OUT oldest int)
LANGUAGE sql IMMUTABLE AS 'SELECT 2, 1';
