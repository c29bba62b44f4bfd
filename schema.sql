-- This schema guarantees that every committed change of a user has a version, a time and an event,
-- and is included in the total, whoever makes the change. Triggers enforce it. Writers need
-- privileges on users only, and no session setting affects it except session_replication_role =
-- replica.
--
-- When the service starts, it runs the steps below in order. Only one replica at a time does so.
-- Each step is a transaction with search_path set to this schema only. A step takes strong locks
-- on existing tables only if something is missing, and waits at most 200 ms for them. After that
-- it is rolled back and retried, so that requests do not queue behind it. If the schema is
-- complete, the steps change nothing, and need no right to create objects.
--
-- To change the schema, add a step before the last one, state in its comment whether the previous
-- release can run on it, and replace the version in step 0, in step 1 and in the last step. To
-- change a function, replace the version too: it keeps an older release that starts from putting
-- its own functions back, and step 1 compares only bodies.
--
-- The service handles these error codes: US001 the database cannot be used, US002 skip the
-- remaining steps, US100 the schema was repaired, US101 a new version was installed, US102 an index
-- must be created concurrently, US103 users of the predecessor wait to be imported.

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
        IF oldest > 5 THEN
            RAISE EXCEPTION USING ERRCODE = 'US001',
                MESSAGE = format('the schema has version %s, and this release knows versions up to 5',
                    installed),
                HINT = 'Run a newer release';
        ELSIF installed > 5 THEN
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

-- Step 1: create functions and tables. If the release of commit c223611 has created users, outbox,
-- idempotency_keys and user_counts, these tables stay unchanged until step 2. That release can run
-- on this step.

-- Functions that exist are compared with their definitions, because to replace one takes the right
-- to create objects, and a complete schema must not need it.
DO $step$
DECLARE
    definition text;
    installed  int := 0;
BEGIN
    IF to_regprocedure('user_service_schema()') IS NOT NULL THEN
        SELECT version INTO installed FROM user_service_schema();
    END IF;
    FOREACH definition IN ARRAY ARRAY[

-- user_service_uuid returns a UUID v7 (RFC 9562 section 5.7). It takes a UUID v4, replaces the
-- first 48 bits by the Unix time in milliseconds, and sets the version bits to 7.
$definition$CREATE OR REPLACE FUNCTION user_service_uuid() RETURNS uuid LANGUAGE sql VOLATILE AS $$
    SELECT encode(set_bit(set_bit(overlay(uuid_send(gen_random_uuid())
        PLACING substring(int8send((date_part('epoch', clock_timestamp()) * 1000)::bigint) FROM 3)
        FROM 1 FOR 6), 52, 1), 53, 1), 'hex')::uuid
$$$definition$,

-- user_service_stamp sets version and updated_at when a user is updated. A change of any other
-- column creates a new version, except when an unchanged password is hashed again. The value of a
-- stored generated column is not computed yet at this point, so in a table with such a column every
-- update counts as a change. An import keeps the given updated_at if it is later than the last one.
--
-- The rows are compared as a whole, because a session caches the types of the columns that a
-- function uses, and the function fails after ALTER TABLE ... ALTER COLUMN ... TYPE. If that
-- happens to id, version or updated_at, the service opens a new session.
$definition$CREATE OR REPLACE FUNCTION user_service_stamp() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    given timestamptz := NEW.updated_at;
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
        IF current_setting('user_service.import', true) IS DISTINCT FROM 'on' THEN
            given := clock_timestamp();
        END IF;
        NEW.updated_at := greatest(given, OLD.updated_at + interval '1 microsecond');
    END IF;
    RETURN NEW;
END
$$$definition$,

-- user_service_record writes the events of a statement and its effect on the total.
--
-- An event has an origin: a trace id, an actor, a traceparent and a tracestate, in one text with a
-- line each. The service sets it as user_service.origin. If one statement makes the changes of
-- several requests, it sets user_service.origins, and the origin of a change is the element at the
-- index of the user's id in user_service.ids. Only a role that can act as the owner sets origins,
-- because others must not choose the actor. Such a role inherits the owner's rights or may SET ROLE
-- to it, which not every member may since PostgreSQL 16. Releases up to 1.3.0 set trace ids alone.
--
-- Otherwise the actor is "sql:" and the role. The other parts are the settings user_service.trace_id,
-- user_service.traceparent and user_service.tracestate, as far as they are valid in HTTP and AMQP
-- headers. Without a trace id, that of the traceparent or a new UUID takes its place.
--
-- An update has an event if the version is new. A later trigger of the site may change updated_at
-- although nothing else changes.
--
-- A session caches query plans. The plan of GROUP BY is suitable for one row and for a million
-- rows, whereas the cached plan of a join could be a nested loop. Without OFFSET 0, an origin would
-- be split for each of its parts. Columns that a site adds to users may have the names of
-- variables.
$definition$CREATE OR REPLACE FUNCTION user_service_record() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path FROM CURRENT AS $$
#variable_conflict use_variable
DECLARE
    ids     bigint[] := nullif(current_setting('user_service.ids', true), '');
    origins text[]   := coalesce(nullif(current_setting('user_service.origins', true), ''),
        nullif(current_setting('user_service.trace_ids', true), ''));
    origin  text     := nullif(current_setting('user_service.origin', true), '');
    writer  text     := 'sql:' || replace(session_user, E'\n', ' ');
    trace   text;
    parent  text;
    state   text;
BEGIN
    IF coalesce(origin, origins[1]) IS NOT NULL AND NOT pg_has_role(session_user, current_user,
        CASE WHEN current_setting('server_version_num')::int < 160000 THEN 'MEMBER'
            ELSE 'USAGE, SET' END)
    THEN
        origin := NULL;
        origins := NULL;
    END IF;
    IF origin IS NULL AND origins IS NULL THEN
        trace := current_setting('user_service.trace_id', true);
        parent := coalesce(current_setting('user_service.traceparent', true), '');
        state := current_setting('user_service.tracestate', true);
        IF parent !~ '^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{1,199})?$'
            OR parent ~ '^ff|^00.{54}|^..-0{32}|^.{35}-0{16}'
        THEN
            parent := '';
        END IF;
        IF parent = '' OR state IS NULL OR state !~ '^[ -~]+$' OR length(state) > 2048 THEN
            state := '';
        END IF;
        IF trace IS NULL OR trace !~ '^[A-Za-z0-9._:-]{1,128}$' THEN
            trace := coalesce(nullif(substring(parent, 4, 32), ''), gen_random_uuid()::text);
        END IF;
        origin := concat_ws(E'\n', trace, writer, parent, state);
    END IF;
    CASE TG_OP
    WHEN 'INSERT' THEN
        INSERT INTO outbox (event_type, user_id, version, occurred_at,
            trace_id, actor, traceparent, tracestate)
        SELECT 'user.created', id, version, greatest(updated_at, now()),
            coalesce(part[1], gen_random_uuid()::text), coalesce(part[2], writer),
            coalesce(part[3], ''), coalesce(part[4], '')
        FROM (
            SELECT id, version, updated_at,
                string_to_array(coalesce(origins[array_position(ids, id)], origin), E'\n') AS part
            FROM inserted OFFSET 0
        ) AS changed;
        INSERT INTO user_counts (n) SELECT count(*) FROM inserted HAVING count(*) > 0;
        -- The writer has set ids: move the sequence past them before the commit, so that no other
        -- writer gets one of these ids and waits for this transaction.
        PERFORM setval(sequence::regclass, highest)
        FROM pg_get_serial_sequence('users', 'id') AS sequence,
            (SELECT max(id) AS highest FROM inserted WHERE id < 9223372036854775807) AS chosen
        WHERE highest > coalesce(pg_sequence_last_value(sequence::regclass), 0);
    WHEN 'UPDATE' THEN
        INSERT INTO outbox (event_type, user_id, version, occurred_at,
            trace_id, actor, traceparent, tracestate)
        SELECT 'user.updated', id, version, greatest(updated_at, now()),
            coalesce(part[1], gen_random_uuid()::text), coalesce(part[2], writer),
            coalesce(part[3], ''), coalesce(part[4], '')
        FROM (
            SELECT id, version, updated_at,
                string_to_array(coalesce(origins[array_position(ids, id)], origin), E'\n') AS part
            FROM (
                SELECT id, max(version) AS version, max(updated_at) AS updated_at
                FROM (
                    SELECT id, version, updated_at, NULL::bigint AS last FROM updated UNION ALL
                    SELECT id, NULL, NULL, version FROM before
                ) AS versions
                GROUP BY id HAVING max(version) <> max(last)
            ) AS new OFFSET 0
        ) AS changed;
    WHEN 'DELETE' THEN
        INSERT INTO outbox (event_type, user_id, version, occurred_at,
            trace_id, actor, traceparent, tracestate)
        SELECT 'user.deleted', id, version + 1,
            greatest(clock_timestamp(), updated_at + interval '1 microsecond'),
            coalesce(part[1], gen_random_uuid()::text), coalesce(part[2], writer),
            coalesce(part[3], ''), coalesce(part[4], '')
        FROM (
            SELECT id, version, updated_at,
                string_to_array(coalesce(origins[array_position(ids, id)], origin), E'\n') AS part
            FROM deleted OFFSET 0
        ) AS changed;
        INSERT INTO user_counts (n) SELECT -count(*) FROM deleted HAVING count(*) > 0;
    WHEN 'TRUNCATE' THEN
        INSERT INTO outbox (event_type, user_id, version, occurred_at,
            trace_id, actor, traceparent, tracestate)
        SELECT 'user.deleted', id, version + 1,
            greatest(clock_timestamp(), updated_at + interval '1 microsecond'),
            coalesce(part[1], gen_random_uuid()::text), coalesce(part[2], writer),
            coalesce(part[3], ''), coalesce(part[4], '')
        FROM (
            SELECT id, version, updated_at,
                string_to_array(coalesce(origins[array_position(ids, id)], origin), E'\n') AS part
            FROM users OFFSET 0
        ) AS changed;
        INSERT INTO user_counts (n) SELECT -count(*) FROM users HAVING count(*) > 0;
        PERFORM set_config('user_service.highest_id', greatest(max(id),
            pg_sequence_last_value(pg_get_serial_sequence('users', 'id')::regclass))::text, true)
        FROM users WHERE id < 9223372036854775807;
    END CASE;
    RETURN NULL;
END
$$$definition$,

-- user_service_keep_ids prevents the reuse of user ids after TRUNCATE ... RESTART IDENTITY.
-- Consumers would drop version 1 of a user of whom they have seen later versions.
$definition$CREATE OR REPLACE FUNCTION user_service_keep_ids() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    highest  bigint   := nullif(current_setting('user_service.highest_id', true), '');
    sequence regclass := pg_get_serial_sequence('users', 'id');
BEGIN
    PERFORM setval(sequence, highest) WHERE highest > coalesce(pg_sequence_last_value(sequence), 0);
    RETURN NULL;
END
$$$definition$,

-- user_service_adopt drops the event that the release of commit c223611 writes itself, because
-- user_service_record writes the event of the change. It passes the trace id on to that function.
$definition$CREATE OR REPLACE FUNCTION user_service_adopt() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('user_service.ids', array_append(
            nullif(current_setting('user_service.ids', true), '')::bigint[], NEW.user_id)::text, true),
        set_config('user_service.trace_ids', array_append(
            nullif(current_setting('user_service.trace_ids', true), '')::text[], NEW.trace_id)::text, true);
    RETURN NULL;
END
$$$definition$,

-- user_service_fold returns a text with which another text is compared regardless of case. It maps
-- each character by Unicode's simple case folding, and İ to i, whatever the locale of the database
-- is. foldCase in memory.go does the same. In a database with the encoding SQL_ASCII, only the
-- letters A to Z are mapped.
--
-- Indexes use this function, so its results must never change. It is not STRICT, because PostgreSQL
-- could not inline it then. The letters are divided, because translate() compares each character
-- with all of them: first those of other scripts, then Greek and Cyrillic, then Latin.
$definition$CREATE OR REPLACE FUNCTION user_service_fold(original text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN octet_length(original) = char_length(original) THEN lower(original COLLATE "C")
    ELSE translate(CASE WHEN original COLLATE "C" !~ '[^\u0001-\u024f]' THEN original
        ELSE translate(CASE WHEN original COLLATE "C" !~ '[^\u0001-\u052f]' THEN original
            ELSE translate(original,
                'ԱԲԳԴԵԶԷԸԹԺԻԼԽԾԿՀՁՂՃՄՅՆՇՈՉՊՋՌՍՎՏՐՑՒՓՔՕՖႠႡႢႣႤႥႦႧႨႩႪႫႬႭႮႯႰႱႲႳႴႵႶႷႸႹႺႻႼႽႾႿჀჁჂჃჄჅჇჍᎠᎡᎢᎣᎤᎥ'
                'ᎦᎧᎨᎩᎪᎫᎬᎭᎮᎯᎰᎱᎲᎳᎴᎵᎶᎷᎸᎹᎺᎻᎼᎽᎾᎿᏀᏁᏂᏃᏄᏅᏆᏇᏈᏉᏊᏋᏌᏍᏎᏏᏐᏑᏒᏓᏔᏕᏖᏗᏘᏙᏚᏛᏜᏝᏞᏟᏠᏡᏢᏣᏤᏥᏦᏧᏨᏩᏪᏫᏬᏭᏮᏯᏰᏱᏲᏳᏴᏵᲀᲁᲂᲃ'
                'ᲄᲅᲆᲇᲐᲑᲒᲓᲔᲕᲖᲗᲘᲙᲚᲛᲜᲝᲞᲟᲠᲡᲢᲣᲤᲥᲦᲧᲨᲩᲪᲫᲬᲭᲮᲯᲰᲱᲲᲳᲴᲵᲶᲷᲸᲹᲺᲽᲾᲿḀḂḄḆḈḊḌḎḐḒḔḖḘḚḜḞḠḢḤḦḨḪḬḮḰḲḴḶḸḺḼḾṀṂ'
                'ṄṆṈṊṌṎṐṒṔṖṘṚṜṞṠṢṤṦṨṪṬṮṰṲṴṶṸṺṼṾẀẂẄẆẈẊẌẎẐẒẔẛẞẠẢẤẦẨẪẬẮẰẲẴẶẸẺẼẾỀỂỄỆỈỊỌỎỐỒỔỖỘỚỜỞỠỢỤỦỨỪỬỮỰ'
                'ỲỴỶỸỺỼỾἈἉἊἋἌἍἎἏἘἙἚἛἜἝἨἩἪἫἬἭἮἯἸἹἺἻἼἽἾἿὈὉὊὋὌὍὙὛὝὟὨὩὪὫὬὭὮὯᾈᾉᾊᾋᾌᾍᾎᾏᾘᾙᾚᾛᾜᾝᾞᾟᾨᾩᾪᾫᾬᾭᾮᾯᾸᾹᾺΆᾼ'
                'ιῈΈῊΉῌῘῙῚΊῨῩῪΎῬῸΌῺΏῼΩKÅℲⅠⅡⅢⅣⅤⅥⅦⅧⅨⅩⅪⅫⅬⅭⅮⅯↃⒶⒷⒸⒹⒺⒻⒼⒽⒾⒿⓀⓁⓂⓃⓄⓅⓆⓇⓈⓉⓊⓋⓌⓍⓎⓏⰀⰁⰂⰃⰄⰅⰆⰇⰈⰉⰊⰋⰌⰍⰎⰏⰐ'
                'ⰑⰒⰓⰔⰕⰖⰗⰘⰙⰚⰛⰜⰝⰞⰟⰠⰡⰢⰣⰤⰥⰦⰧⰨⰩⰪⰫⰬⰭⰮⰯⱠⱢⱣⱤⱧⱩⱫⱭⱮⱯⱰⱲⱵⱾⱿⲀⲂⲄⲆⲈⲊⲌⲎⲐⲒⲔⲖⲘⲚⲜⲞⲠⲢⲤⲦⲨⲪⲬⲮⲰⲲⲴⲶⲸⲺⲼⲾⳀⳂⳄⳆⳈⳊ'
                'ⳌⳎⳐⳒⳔⳖⳘⳚⳜⳞⳠⳢⳫⳭⳲꙀꙂꙄꙆꙈꙊꙋꙌꙎꙐꙒꙔꙖꙘꙚꙜꙞꙠꙢꙤꙦꙨꙪꙬꚀꚂꚄꚆꚈꚊꚌꚎꚐꚒꚔꚖꚘꚚꜢꜤꜦꜨꜪꜬꜮꜲꜴꜶꜸꜺꜼꜾꝀꝂꝄꝆꝈꝊꝌꝎꝐꝒꝔꝖꝘꝚꝜꝞꝠ'
                'ꝢꝤꝦꝨꝪꝬꝮꝹꝻꝽꝾꞀꞂꞄꞆꞋꞍꞐꞒꞖꞘꞚꞜꞞꞠꞢꞤꞦꞨꞪꞫꞬꞭꞮꞰꞱꞲꞳꞴꞶꞸꞺꞼꞾꟀꟂꟄꟅꟆꟇꟉꟐꟖꟘꟵＡＢＣＤＥＦＧＨＩＪＫＬＭＮＯＰＱＲＳＴＵＶＷＸＹＺ𐐀𐐁𐐂'
                '𐐃𐐄𐐅𐐆𐐇𐐈𐐉𐐊𐐋𐐌𐐍𐐎𐐏𐐐𐐑𐐒𐐓𐐔𐐕𐐖𐐗𐐘𐐙𐐚𐐛𐐜𐐝𐐞𐐟𐐠𐐡𐐢𐐣𐐤𐐥𐐦𐐧𐒰𐒱𐒲𐒳𐒴𐒵𐒶𐒷𐒸𐒹𐒺𐒻𐒼𐒽𐒾𐒿𐓀𐓁𐓂𐓃𐓄𐓅𐓆𐓇𐓈𐓉𐓊𐓋𐓌𐓍𐓎𐓏𐓐𐓑𐓒𐓓𐕰𐕱𐕲𐕳𐕴𐕵𐕶𐕷𐕸𐕹𐕺'
                '𐕼𐕽𐕾𐕿𐖀𐖁𐖂𐖃𐖄𐖅𐖆𐖇𐖈𐖉𐖊𐖌𐖍𐖎𐖏𐖐𐖑𐖒𐖔𐖕𐲀𐲁𐲂𐲃𐲄𐲅𐲆𐲇𐲈𐲉𐲊𐲋𐲌𐲍𐲎𐲏𐲐𐲑𐲒𐲓𐲔𐲕𐲖𐲗𐲘𐲙𐲚𐲛𐲜𐲝𐲞𐲟𐲠𐲡𐲢𐲣𐲤𐲥𐲦𐲧𐲨𐲩𐲪𐲫𐲬𐲭𐲮𐲯𐲰𐲱𐲲𑢠𑢡𑢢𑢣𑢤𑢥𑢦𑢧𑢨'
                '𑢩𑢪𑢫𑢬𑢭𑢮𑢯𑢰𑢱𑢲𑢳𑢴𑢵𑢶𑢷𑢸𑢹𑢺𑢻𑢼𑢽𑢾𑢿𖹀𖹁𖹂𖹃𖹄𖹅𖹆𖹇𖹈𖹉𖹊𖹋𖹌𖹍𖹎𖹏𖹐𖹑𖹒𖹓𖹔𖹕𖹖𖹗𖹘𖹙𖹚𖹛𖹜𖹝𖹞𖹟𞤀𞤁𞤂𞤃𞤄𞤅𞤆𞤇𞤈𞤉𞤊𞤋𞤌𞤍𞤎𞤏𞤐𞤑𞤒𞤓𞤔𞤕𞤖𞤗𞤘𞤙𞤚𞤛𞤜'
                '𞤝𞤞𞤟𞤠𞤡',
                'աբգդեզէըթժիլխծկհձղճմյնշոչպջռսվտրցւփքօֆⴀⴁⴂⴃⴄⴅⴆⴇⴈⴉⴊⴋⴌⴍⴎⴏⴐⴑⴒⴓⴔⴕⴖⴗⴘⴙⴚⴛⴜⴝⴞⴟⴠⴡⴢⴣⴤⴥⴧⴭꭰꭱꭲꭳꭴꭵ'
                'ꭶꭷꭸꭹꭺꭻꭼꭽꭾꭿꮀꮁꮂꮃꮄꮅꮆꮇꮈꮉꮊꮋꮌꮍꮎꮏꮐꮑꮒꮓꮔꮕꮖꮗꮘꮙꮚꮛꮜꮝꮞꮟꮠꮡꮢꮣꮤꮥꮦꮧꮨꮩꮪꮫꮬꮭꮮꮯꮰꮱꮲꮳꮴꮵꮶꮷꮸꮹꮺꮻꮼꮽꮾꮿᏸᏹᏺᏻᏼᏽвдос'
                'ттъѣაბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰჱჲჳჴჵჶჷჸჹჺჽჾჿḁḃḅḇḉḋḍḏḑḓḕḗḙḛḝḟḡḣḥḧḩḫḭḯḱḳḵḷḹḻḽḿṁṃ'
                'ṅṇṉṋṍṏṑṓṕṗṙṛṝṟṡṣṥṧṩṫṭṯṱṳṵṷṹṻṽṿẁẃẅẇẉẋẍẏẑẓẕṡßạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữự'
                'ỳỵỷỹỻỽỿἀἁἂἃἄἅἆἇἐἑἒἓἔἕἠἡἢἣἤἥἦἧἰἱἲἳἴἵἶἷὀὁὂὃὄὅὑὓὕὗὠὡὢὣὤὥὦὧᾀᾁᾂᾃᾄᾅᾆᾇᾐᾑᾒᾓᾔᾕᾖᾗᾠᾡᾢᾣᾤᾥᾦᾧᾰᾱὰάᾳ'
                'ͅὲέὴήῃῐῑὶίῠῡὺύῥὸόὼώῳωkåⅎⅰⅱⅲⅳⅴⅵⅶⅷⅸⅹⅺⅻⅼⅽⅾⅿↄⓐⓑⓒⓓⓔⓕⓖⓗⓘⓙⓚⓛⓜⓝⓞⓟⓠⓡⓢⓣⓤⓥⓦⓧⓨⓩⰰⰱⰲⰳⰴⰵⰶⰷⰸⰹⰺⰻⰼⰽⰾⰿⱀ'
                'ⱁⱂⱃⱄⱅⱆⱇⱈⱉⱊⱋⱌⱍⱎⱏⱐⱑⱒⱓⱔⱕⱖⱗⱘⱙⱚⱛⱜⱝⱞⱟⱡɫᵽɽⱨⱪⱬɑɱɐɒⱳⱶȿɀⲁⲃⲅⲇⲉⲋⲍⲏⲑⲓⲕⲗⲙⲛⲝⲟⲡⲣⲥⲧⲩⲫⲭⲯⲱⲳⲵⲷⲹⲻⲽⲿⳁⳃⳅⳇⳉⳋ'
                'ⳍⳏⳑⳓⳕⳗⳙⳛⳝⳟⳡⳣⳬⳮⳳꙁꙃꙅꙇꙉᲈᲈꙍꙏꙑꙓꙕꙗꙙꙛꙝꙟꙡꙣꙥꙧꙩꙫꙭꚁꚃꚅꚇꚉꚋꚍꚏꚑꚓꚕꚗꚙꚛꜣꜥꜧꜩꜫꜭꜯꜳꜵꜷꜹꜻꜽꜿꝁꝃꝅꝇꝉꝋꝍꝏꝑꝓꝕꝗꝙꝛꝝꝟꝡ'
                'ꝣꝥꝧꝩꝫꝭꝯꝺꝼᵹꝿꞁꞃꞅꞇꞌɥꞑꞓꞗꞙꞛꞝꞟꞡꞣꞥꞧꞩɦɜɡɬɪʞʇʝꭓꞵꞷꞹꞻꞽꞿꟁꟃꞔʂᶎꟈꟊꟑꟗꟙꟶａｂｃｄｅｆｇｈｉｊｋｌｍｎｏｐｑｒｓｔｕｖｗｘｙｚ𐐨𐐩𐐪'
                '𐐫𐐬𐐭𐐮𐐯𐐰𐐱𐐲𐐳𐐴𐐵𐐶𐐷𐐸𐐹𐐺𐐻𐐼𐐽𐐾𐐿𐑀𐑁𐑂𐑃𐑄𐑅𐑆𐑇𐑈𐑉𐑊𐑋𐑌𐑍𐑎𐑏𐓘𐓙𐓚𐓛𐓜𐓝𐓞𐓟𐓠𐓡𐓢𐓣𐓤𐓥𐓦𐓧𐓨𐓩𐓪𐓫𐓬𐓭𐓮𐓯𐓰𐓱𐓲𐓳𐓴𐓵𐓶𐓷𐓸𐓹𐓺𐓻𐖗𐖘𐖙𐖚𐖛𐖜𐖝𐖞𐖟𐖠𐖡'
                '𐖣𐖤𐖥𐖦𐖧𐖨𐖩𐖪𐖫𐖬𐖭𐖮𐖯𐖰𐖱𐖳𐖴𐖵𐖶𐖷𐖸𐖹𐖻𐖼𐳀𐳁𐳂𐳃𐳄𐳅𐳆𐳇𐳈𐳉𐳊𐳋𐳌𐳍𐳎𐳏𐳐𐳑𐳒𐳓𐳔𐳕𐳖𐳗𐳘𐳙𐳚𐳛𐳜𐳝𐳞𐳟𐳠𐳡𐳢𐳣𐳤𐳥𐳦𐳧𐳨𐳩𐳪𐳫𐳬𐳭𐳮𐳯𐳰𐳱𐳲𑣀𑣁𑣂𑣃𑣄𑣅𑣆𑣇𑣈'
                '𑣉𑣊𑣋𑣌𑣍𑣎𑣏𑣐𑣑𑣒𑣓𑣔𑣕𑣖𑣗𑣘𑣙𑣚𑣛𑣜𑣝𑣞𑣟𖹠𖹡𖹢𖹣𖹤𖹥𖹦𖹧𖹨𖹩𖹪𖹫𖹬𖹭𖹮𖹯𖹰𖹱𖹲𖹳𖹴𖹵𖹶𖹷𖹸𖹹𖹺𖹻𖹼𖹽𖹾𖹿𞤢𞤣𞤤𞤥𞤦𞤧𞤨𞤩𞤪𞤫𞤬𞤭𞤮𞤯𞤰𞤱𞤲𞤳𞤴𞤵𞤶𞤷𞤸𞤹𞤺𞤻𞤼𞤽𞤾'
                '𞤿𞥀𞥁𞥂𞥃')
            END,
                'ͰͲͶͿΆΈΉΊΌΎΏΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩΪΫιμςϏϐϑϕϖϘϚϜϞϠϢϤϦϨϪϬϮϰϱϴϵϷϹϺϽϾϿЀЁЂЃЄЅІЇЈЉЊЋЌЍЎЏА'
                'БВГДЕЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯѠѢѤѦѨѪѬѮѰѲѴѶѸѺѼѾҀҊҌҎҐҒҔҖҘҚҜҞҠҢҤҦҨҪҬҮҰҲҴҶҸҺҼҾӀӁӃӅӇӉӋӍӐ'
                'ӒӔӖӘӚӜӞӠӢӤӦӨӪӬӮӰӲӴӶӸӺӼӾԀԂԄԆԈԊԌԎԐԒԔԖԘԚԜԞԠԢԤԦԨԪԬԮ',
                'ͱͳͷϳάέήίόύώαβγδεζηθͅκλµνξοπρστυφχψωϊϋͅµσϗβθφπϙϛϝϟϡϣϥϧϩϫϭϯκρθεϸϲϻͻͼͽѐёђѓєѕіїјљњћќѝўџа'
                'бвгдежзийклмнопрстуфхцчшщъыьэюяѡѣѥѧѩѫѭѯѱѳѵѷѹѻѽѿҁҋҍҏґғҕҗҙқҝҟҡңҥҧҩҫҭүұҳҵҷҹһҽҿӏӂӄӆӈӊӌӎӑ'
                'ӓӕӗәӛӝӟӡӣӥӧөӫӭӯӱӳӵӷӹӻӽӿԁԃԅԇԉԋԍԏԑԓԕԗԙԛԝԟԡԣԥԧԩԫԭԯ')
        END,
                'ABCDEFGHIJKLMNOPQRSTUVWXYZÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÐÑÒÓÔÕÖØÙÚÛÜÝÞĀĂĄĆĈĊČĎĐĒĔĖĘĚĜĞĠĢĤĦĨĪĬĮİĲĴĶ'
                'ĹĻĽĿŁŃŅŇŊŌŎŐŒŔŖŘŚŜŞŠŢŤŦŨŪŬŮŰŲŴŶŸŹŻŽſƁƂƄƆƇƉƊƋƎƏƐƑƓƔƖƗƘƜƝƟƠƢƤƦƧƩƬƮƯƱƲƳƵƷƸƼǄǅǇǈǊǋǍǏǑǓǕǗ'
                'ǙǛǞǠǢǤǦǨǪǬǮǱǲǴǶǷǸǺǼǾȀȂȄȆȈȊȌȎȐȒȔȖȘȚȜȞȠȢȤȦȨȪȬȮȰȲȺȻȽȾɁɃɄɅɆɈɊɌɎ',
                'abcdefghijklmnopqrstuvwxyzàáâãäåæçèéêëìíîïðñòóôõöøùúûüýþāăąćĉċčďđēĕėęěĝğġģĥħĩīĭįiĳĵķ'
                'ĺļľŀłńņňŋōŏőœŕŗřśŝşšţťŧũūŭůűųŵŷÿźżžsɓƃƅɔƈɖɗƌǝəɛƒɠɣɩɨƙɯɲɵơƣƥʀƨʃƭʈưʊʋƴƶʒƹƽǆǆǉǉǌǌǎǐǒǔǖǘ'
                'ǚǜǟǡǣǥǧǩǫǭǯǳǳǵƕƿǹǻǽǿȁȃȅȇȉȋȍȏȑȓȕȗșțȝȟƞȣȥȧȩȫȭȯȱȳⱥȼƚⱦɂƀʉʌɇɉɋɍɏ')
    END
$$$definition$,

-- user_service_find returns the users whose name or surname begins with a prefix, regardless of
-- case: how many there are, or 10001 if there are more than 10000, and the ids of those above after,
-- in their order, without the first skipped ones, and most of them at most. last is a suffix that
-- sorts after the rest of every name.
--
-- No index serves both a prefix and the order of ids. Up to 10000 ids are read and sorted. Of more
-- matches, enough are probably among the next 3000 users, or more if some are skipped. Only if they
-- are not, the ids of all matches are read, which takes 0.1 ms per 1000 of them. Columns that a
-- site adds to users may have the names of variables.
$definition$CREATE OR REPLACE FUNCTION user_service_find(
    prefix text, last text, after bigint, skipped bigint, most bigint, OUT total bigint, OUT ids bigint[]
) LANGUAGE plpgsql STABLE SET plan_cache_mode = force_generic_plan SET enable_seqscan = off AS $$
#variable_conflict use_variable
DECLARE
    low      text     := user_service_fold(prefix);
    high     text     := low || last;
    names    bigint[] := ARRAY(SELECT id FROM users
        WHERE user_service_fold(name) ~>=~ low AND user_service_fold(name) ~<~ high
            AND octet_length(name) <= 1020
        LIMIT 10001);
    surnames bigint[] := ARRAY(SELECT id FROM users
        WHERE user_service_fold(surname) ~>=~ low AND user_service_fold(surname) ~<~ high
            AND octet_length(surname) <= 1020
        LIMIT 10001 * (cardinality(names) < 10001)::int);
BEGIN
    total := greatest(cardinality(names), cardinality(surnames));
    IF total < 10001 THEN
        names := ARRAY(SELECT unnest(names) UNION SELECT unnest(surnames));
        total := least(cardinality(names), 10001);
    END IF;
    IF total < 10001 THEN
        ids := ARRAY(SELECT id FROM unnest(names) AS id WHERE id > after ORDER BY id
            OFFSET skipped LIMIT most);
        RETURN;
    END IF;
    ids := ARRAY(SELECT id
        FROM (
            SELECT id, name, surname FROM users
            WHERE id > after ORDER BY id LIMIT least(3000 + 20 * skipped, 50000)
        ) AS next
        WHERE starts_with(user_service_fold(name), low) AND octet_length(name) <= 1020
            OR starts_with(user_service_fold(surname), low) AND octet_length(surname) <= 1020
        ORDER BY id LIMIT skipped + most);
    IF cardinality(ids) < skipped + most THEN -- "+ 0" prevents a scan in the order of ids
        ids := ARRAY(
            (SELECT id FROM users
                WHERE user_service_fold(name) ~>=~ low AND user_service_fold(name) ~<~ high
                    AND octet_length(name) <= 1020 AND id > after ORDER BY id + 0 LIMIT skipped + most)
            UNION
            (SELECT id FROM users
                WHERE user_service_fold(surname) ~>=~ low AND user_service_fold(surname) ~<~ high
                    AND octet_length(surname) <= 1020 AND id > after ORDER BY id + 0 LIMIT skipped + most)
            ORDER BY 1 LIMIT skipped + most);
    END IF;
    ids := ids[skipped + 1:];
END
$$$definition$

    ] LOOP
        IF installed < 5 OR NOT EXISTS (
            SELECT FROM pg_proc
            WHERE oid = to_regproc(substring(definition FROM 'FUNCTION (\w+)'))
                AND position('$$' || prosrc || '$$' IN definition) > 0
                AND pg_has_role(proowner, 'USAGE')
                AND (NOT prosecdef
                    OR 'search_path=' || current_setting('search_path') = ANY (proconfig)))
        THEN
            EXECUTE definition;
        END IF;
    END LOOP;
    -- The indexes of users call this function with the rights of the writer.
    IF NOT has_function_privilege('public', 'user_service_fold(text)', 'EXECUTE') THEN
        GRANT EXECUTE ON FUNCTION user_service_fold TO PUBLIC;
    END IF;
END
$step$;

DO $$
BEGIN
    IF to_regclass('users') IS NULL THEN
        CREATE TABLE users (
            id         bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
            name       text        NOT NULL,
            surname    text        NOT NULL,
            password   text        NOT NULL,               -- argon2id hash as a PHC string
            version    bigint      NOT NULL DEFAULT 1,     -- incremented by each change
            created_at timestamptz NOT NULL DEFAULT now(),
            updated_at timestamptz NOT NULL DEFAULT now()
        );
    END IF;

    -- outbox contains the events of committed changes that the broker has not confirmed yet. It is
    -- empty when all events are published. For one user, the order of ids is the order of versions,
    -- because an id is assigned while the user's row is locked. Across users, the order of ids is
    -- not the order of commits, so a reader must not use an id as its position.
    IF to_regclass('outbox') IS NULL THEN
        CREATE TABLE outbox (
            id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            event_id    uuid        NOT NULL DEFAULT user_service_uuid(),
            event_type  text        NOT NULL,
            user_id     bigint      NOT NULL,
            version     bigint      NOT NULL,
            trace_id    text        NOT NULL,
            occurred_at timestamptz NOT NULL,
            actor       text        NOT NULL DEFAULT '', -- an API key, a subject, or sql: and a role
            traceparent text        NOT NULL DEFAULT '', -- of the request (W3C Trace Context)
            tracestate  text        NOT NULL DEFAULT ''
        ) WITH ( -- rows are deleted after milliseconds, so vacuum early and without delay
            autovacuum_vacuum_scale_factor = 0,
            autovacuum_vacuum_threshold    = 1000,
            autovacuum_vacuum_cost_delay   = 0
        );
    END IF;

    -- idempotency_keys records the users that were created with an Idempotency-Key, with the values
    -- of the request. If the request had an API key, key begins with the API key's name and a tab;
    -- if it had an access token, with "token", the issuer and the subject, each with a tab. Rows
    -- are deleted after 24 hours.
    IF to_regclass('idempotency_keys') IS NULL THEN
        CREATE TABLE idempotency_keys (
            key        text        PRIMARY KEY,
            user_id    bigint      NOT NULL,
            name       text        NOT NULL,
            surname    text        NOT NULL,
            password   text        NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now()
        );
    END IF;

    -- The total number of users is the sum of n. Each statement that inserts or deletes users
    -- inserts a row here, so that writers do not wait for each other. The replicas regularly
    -- replace the rows with a single one. The table always has a row, because the release of commit
    -- c223611 needs one.
    IF to_regclass('user_counts') IS NULL THEN
        CREATE TABLE user_counts (
            n bigint NOT NULL
        ) WITH (
            autovacuum_vacuum_scale_factor = 0,
            autovacuum_vacuum_threshold    = 1000,
            autovacuum_vacuum_cost_delay   = 0
        );
    END IF;

    -- relay_lease names the replica that relays events, and when its lease expires by the
    -- database's clock. It has one row after the first replica has requested the lease. It has no
    -- primary key, because a restore may add an older row. See outbox.go.
    IF to_regclass('relay_lease') IS NULL THEN
        CREATE TABLE relay_lease (
            holder text        NOT NULL,
            until  timestamptz NOT NULL
        ) WITH (
            autovacuum_vacuum_scale_factor = 0,
            autovacuum_vacuum_threshold    = 1000,
            autovacuum_vacuum_cost_delay   = 0
        );
    END IF;
END
$$;

-- Version 4 added the last three columns. The functions need them.
DO $$
DECLARE
    missing text;
    code    text := '01000';
BEGIN
    IF to_regprocedure('user_service_schema()') IS NOT NULL THEN
        SELECT CASE WHEN version < 4 THEN code ELSE 'US100' END INTO code FROM user_service_schema();
    END IF;
    FOR missing IN
        SELECT name FROM unnest('{actor, traceparent, tracestate}'::text[]) AS name
        WHERE NOT EXISTS (
            SELECT FROM pg_attribute
            WHERE attrelid = 'outbox'::regclass AND attname = name AND NOT attisdropped)
    LOOP
        EXECUTE format('ALTER TABLE outbox ADD COLUMN %I text NOT NULL DEFAULT ''''', missing);
        RAISE WARNING 'created the column % of outbox', missing USING ERRCODE = code;
    END LOOP;
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

-- Step 4: create what searches need. The previous release can run on this step; its changes of names
-- take longer, because they change the indexes too.

-- Creating an index locks a table against changes. If the table is larger than 8 MiB, the service
-- creates it concurrently after the start. Until then, searches are slow. An index that is not valid
-- is left by an attempt that failed, unless another replica is creating it. An entry of an index has a
-- limited size, so names that are longer than the API allows are left out, and not found.
DO $$
DECLARE
    missing record;
    code    text := '01000';
BEGIN
    IF to_regprocedure('user_service_schema()') IS NOT NULL THEN
        SELECT CASE WHEN version < 3 THEN code ELSE 'US100' END INTO code FROM user_service_schema();
    END IF;
    FOR missing IN
        SELECT 'user_service_' || attname AS name,
            format('%1$s ON users (user_service_fold(%2$s) text_pattern_ops, id) INCLUDE (%2$s)
                WHERE octet_length(%2$s) <= 1020', 'user_service_' || attname, attname) AS definition
        FROM unnest('{name, surname}'::text[]) AS attname
        WHERE NOT EXISTS (
                SELECT FROM pg_index
                WHERE indexrelid = to_regclass('user_service_' || attname) AND indisvalid)
            AND NOT EXISTS (
                SELECT FROM pg_stat_progress_create_index
                WHERE index_relid = to_regclass('user_service_' || attname))
    LOOP
        IF pg_relation_size('users') > 8 * 1024 * 1024 THEN
            RAISE WARNING '%', missing.definition
                USING ERRCODE = 'US102', SCHEMA = current_schema();
            CONTINUE;
        END IF;
        EXECUTE format('DROP INDEX IF EXISTS %I', missing.name);
        EXECUTE 'CREATE INDEX ' || missing.definition;
        RAISE WARNING 'created the index %', missing.name USING ERRCODE = code;
    END LOOP;
END
$$;

-- Step 5: let a publication include every table. Without a replica identity, PostgreSQL refuses to
-- update or delete the rows of a published table, and these tables have no primary key. The
-- previous release can run on this step.
DO $$
DECLARE
    missing regclass;
    code    text := '01000';
BEGIN
    IF to_regprocedure('user_service_schema()') IS NOT NULL THEN
        SELECT CASE WHEN version < 5 THEN code ELSE 'US100' END INTO code
        FROM user_service_schema();
    END IF;
    FOR missing IN
        SELECT oid FROM pg_class
        WHERE oid IN ('user_counts'::regclass, 'relay_lease'::regclass)
            AND relreplident IN ('d', 'n')
    LOOP
        EXECUTE format('ALTER TABLE %s REPLICA IDENTITY FULL', missing);
        RAISE WARNING 'set the replica identity of %', missing USING ERRCODE = code;
    END LOOP;
END
$$;

-- Step 6: repair the data. It moves sequences past the ids in use, corrects the total, and installs
-- the version, which means that all steps are complete. Correcting the total needs no lock: a
-- change and its row in user_counts become visible together, so a snapshot that does not include a
-- change does not include its row either.
DO $$
DECLARE
    relation  text;
    sequence  text;
    highest   bigint;
    used      bigint; -- by the sequence; the next id may be too large for a bigint
    missing   bigint;
    installed int  := 0;
    waiting   bool;
    code      text := CASE WHEN to_regprocedure('user_service_schema()') IS NULL
        THEN '01000' ELSE 'US100' END;
BEGIN
    FOREACH relation IN ARRAY '{users, outbox}'::text[] LOOP
        sequence := pg_get_serial_sequence(relation, 'id');
        EXECUTE format('SELECT max(id) FROM %I WHERE id < 9223372036854775807', relation) INTO highest;
        EXECUTE format('SELECT last_value - (NOT is_called)::int FROM %s', sequence) INTO used;
        IF highest > used THEN
            PERFORM setval(sequence, highest);
            RAISE WARNING 'moved the sequence of %.id from % behind %', relation, used, highest
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

    IF to_regprocedure('user_service_schema()') IS NOT NULL THEN
        SELECT version INTO installed FROM user_service_schema();
    END IF;
    IF installed < 5 THEN
        RAISE WARNING 'installed version 5' USING ERRCODE = 'US101';
    END IF;

    IF NOT EXISTS (SELECT FROM users) AND has_table_privilege(to_regclass('"user"')::oid, 'SELECT')
        AND 6 = (
            SELECT count(*) FROM pg_attribute
            WHERE attrelid = to_regclass('"user"') AND NOT attisdropped
                AND attname IN ('id', 'name', 'surname', 'password', 'created_at', 'updated_at'))
    THEN
        EXECUTE 'SELECT true FROM "user" LIMIT 1' INTO waiting;
        IF waiting THEN
            RAISE WARNING 'the table "user" has users, the table users has none' USING ERRCODE = 'US103';
        END IF;
    END IF;

    -- user_service_schema returns the version of the schema, and the oldest version that a release
    -- must know to use it. It is a function and not a row so that a dump of the schema alone
    -- includes it.
    IF installed < 5 THEN
        CREATE OR REPLACE FUNCTION user_service_schema(OUT version int, OUT oldest int)
        LANGUAGE sql IMMUTABLE AS 'SELECT 5, 1';
    END IF;
END
$$;
