-- Reading a user's memories anew after their language changed.

ALTER TABLE settings
    ADD COLUMN language_version bigint NOT NULL DEFAULT 0 CHECK (language_version >= 0);
COMMENT ON COLUMN settings.language_version IS 'The version that brought the language. 0: never chosen. A job of an earlier one has nothing left to do.';

-- Names the running transaction's user where writers of memories and a change of the language meet.
CREATE FUNCTION language_lock() RETURNS bigint LANGUAGE sql STABLE PARALLEL SAFE
    RETURN hashtextextended('language/' || current_user_id()::text, 0);

-- The language that the running transaction's user writes memories in. It stays so until the
-- transaction ends: a change of the language waits for all who write in the old one, and whoever
-- comes meanwhile waits for the change.
CREATE FUNCTION language_to_write_in() RETURNS text LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(language_lock());
    -- A statement of its own: it sees what was committed while the lock was waited for.
    RETURN coalesce((SELECT language
                       FROM settings
                      WHERE tenant_id = current_tenant() AND user_id = current_user_id()),
                    'english');
END
$$;

-- Until now all texts were read as English. The owner of the tables sees rows only like this.
ALTER TABLE settings NO FORCE ROW LEVEL SECURITY;
ALTER TABLE jobs     NO FORCE ROW LEVEL SECURITY;
UPDATE settings SET language_version = version WHERE language <> 'english';
-- Later, because servers that are still being replaced go on writing English.
INSERT INTO jobs (id, tenant_id, user_id, kind, run_at, max_attempts, payload, unique_key)
SELECT uuidv7(), tenant_id, user_id, 'memories.reindex', now() + interval '15 minutes', 10,
       jsonb_build_object('tenant_id', 'ten_' || replace(tenant_id::text, '-', ''),
                          'user_id', 'usr_' || replace(user_id::text, '-', ''),
                          'settings_version', version),
       format('memories.reindex/usr_%s/%s', replace(user_id::text, '-', ''), version)
  FROM settings
 WHERE language <> 'english';
ALTER TABLE jobs     FORCE ROW LEVEL SECURITY;
ALTER TABLE settings FORCE ROW LEVEL SECURITY;
