/* The least file system that looks like a tree of snapshots: what FUSE itself costs.
 *
 * active/, view/ and committed/ hold directories, each with a mounts.json.  mkdir, rename and rmdir keep a hash table in memory and
 * do nothing else.  It is on libfuse's low-level API, with one thread, and lets the kernel remember all that snapfs lets it
 * remember, directories included.
 *
 *     minimal MOUNTPOINT ENTRIES [libfuse's options]     with so many entries in committed/ to begin with
 */
#define FUSE_USE_VERSION 314
#include <errno.h>
#include <fuse_lowlevel.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define TIMEOUT 600.0
#define KINDS 3
#define FIRST 16 /* inode of entry n: 2 n + FIRST, that of its mounts.json: one more */

static const char *const kinds[KINDS] = {"active", "view", "committed"}; /* inodes 2, 3, 4 */

static const char content[] = "[\n  {\n    \"type\": \"overlay\",\n    \"source\": \"overlay\",\n    \"options\": [\n"
	"      \"workdir=/srv/snapfs/snapshots/3/work\",\n      \"upperdir=/srv/snapfs/snapshots/3/fs\",\n"
	"      \"lowerdir=/srv/snapfs/snapshots/2/fs:/srv/snapfs/snapshots/1/fs\",\n      \"index=off\"\n    ]\n  }\n]\n";

struct entry {
	char *name; /* NULL: removed */
	uint32_t hash;
	uint32_t next; /* in its bucket, 0: none */
	int directory;
	struct timespec made;
};

static struct entry *entries; /* entries[0] is none */
static uint32_t used = 1, room;
static uint32_t *buckets, mask;
static struct timespec started;

static uint32_t hash_of(int directory, const char *name)
{
	uint32_t hash = 2166136261u ^ (uint32_t)directory;
	for (; *name; name++)
		hash = (hash ^ (unsigned char)*name) * 16777619u;
	return hash;
}

static void *checked(void *memory)
{
	if (!memory) {
		perror("minimal");
		exit(1);
	}
	return memory;
}

static void grow(void)
{
	room = room ? room * 2 : 1024;
	entries = checked(realloc(entries, room * sizeof *entries));
	free(buckets);
	buckets = checked(calloc(room * 2, sizeof *buckets));
	mask = room * 2 - 1;
	for (uint32_t n = 1; n < used; n++)
		if (entries[n].name) {
			entries[n].next = buckets[entries[n].hash & mask];
			buckets[entries[n].hash & mask] = n;
		}
}

static uint32_t find(int directory, const char *name)
{
	uint32_t hash = hash_of(directory, name), n = buckets[hash & mask];
	while (n && (entries[n].hash != hash || entries[n].directory != directory || strcmp(entries[n].name, name)))
		n = entries[n].next;
	return n;
}

static void link_in(uint32_t n, int directory, const char *name)
{
	struct entry *entry = &entries[n];
	entry->name = checked(strdup(name));
	entry->directory = directory;
	entry->hash = hash_of(directory, name);
	entry->next = buckets[entry->hash & mask];
	buckets[entry->hash & mask] = n;
}

static void take_out(uint32_t n)
{
	uint32_t *at = &buckets[entries[n].hash & mask];
	while (*at != n)
		at = &entries[*at].next;
	*at = entries[n].next;
	free(entries[n].name);
	entries[n].name = NULL;
}

static uint32_t add(int directory, const char *name)
{
	if (used >= room)
		grow();
	clock_gettime(CLOCK_REALTIME, &entries[used].made);
	link_in(used, directory, name);
	return used++;
}

static int is_kind(fuse_ino_t ino) { return ino >= 2 && ino < 2 + KINDS; }

static struct entry *entry_of(fuse_ino_t ino)
{
	uint64_t n = (ino - FIRST) / 2;
	return ino >= FIRST + 2 && n < used && entries[n].name ? &entries[n] : NULL;
}

static int fill(struct stat *st, fuse_ino_t ino)
{
	struct entry *entry = ino >= FIRST ? entry_of(ino) : NULL;
	if (ino != FUSE_ROOT_ID && !is_kind(ino) && !entry)
		return ENOENT;
	memset(st, 0, sizeof *st);
	int is_file = entry && ino & 1;
	st->st_ino = ino;
	st->st_mode = is_file ? S_IFREG | 0444 : S_IFDIR | 0755;
	st->st_nlink = 1;
	st->st_size = is_file ? (off_t)sizeof content - 1 : 0;
	st->st_blksize = 4096;
	st->st_blocks = entry ? 8 : 0;
	st->st_atim = st->st_mtim = st->st_ctim = entry ? entry->made : started;
	return 0;
}

static int found(struct fuse_entry_param *e, fuse_ino_t ino)
{
	memset(e, 0, sizeof *e);
	e->ino = ino;
	e->attr_timeout = e->entry_timeout = TIMEOUT;
	return fill(&e->attr, ino);
}

static void reply_found(fuse_req_t req, fuse_ino_t ino)
{
	struct fuse_entry_param e;
	if (found(&e, ino))
		fuse_reply_err(req, ENOENT);
	else
		fuse_reply_entry(req, &e);
}

static void do_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	fuse_ino_t ino = 0;
	if (parent == FUSE_ROOT_ID) {
		for (int kind = 0; kind < KINDS; kind++)
			if (!strcmp(name, kinds[kind]))
				ino = 2 + kind;
	} else if (is_kind(parent)) {
		uint32_t n = find(parent, name);
		ino = n ? 2 * (fuse_ino_t)n + FIRST : 0;
	} else if (!(parent & 1) && !strcmp(name, "mounts.json")) {
		ino = parent + 1;
	}
	if (ino)
		reply_found(req, ino);
	else
		fuse_reply_err(req, ENOENT);
}

static void do_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct stat st;
	(void)fi;
	if (fill(&st, ino))
		fuse_reply_err(req, ENOENT);
	else
		fuse_reply_attr(req, &st, TIMEOUT);
}

static void do_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
	(void)mode;
	if (!is_kind(parent))
		fuse_reply_err(req, EPERM);
	else if (find(parent, name))
		fuse_reply_err(req, EEXIST);
	else
		reply_found(req, 2 * (fuse_ino_t)add(parent, name) + FIRST);
}

static void do_rmdir(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	uint32_t n = is_kind(parent) ? find(parent, name) : 0;
	if (n)
		take_out(n);
	fuse_reply_err(req, n ? 0 : ENOENT);
}

static void do_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t newparent, const char *newname, unsigned flags)
{
	(void)flags;
	uint32_t n = is_kind(parent) ? find(parent, name) : 0;
	if (!n || !is_kind(newparent)) {
		fuse_reply_err(req, n ? EPERM : ENOENT);
	} else if (find(newparent, newname)) {
		fuse_reply_err(req, EEXIST);
	} else {
		take_out(n);
		link_in(n, newparent, newname);
		fuse_reply_err(req, 0);
	}
}

static void do_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	(void)ino;
	fi->cache_readdir = 1;
	fi->keep_cache = 1;
	fuse_reply_open(req, fi);
}

/* The offset of an entry is what comes after it: 1 and 2 after the dots, then 2 + its number. */
static void list(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, int plus)
{
	char *buffer = checked(malloc(size));
	size_t filled = 0;
	uint64_t last = ino == FUSE_ROOT_ID ? 2 + KINDS : is_kind(ino) ? 2 + used - 1 : 3;
	for (uint64_t at = off; at < last; at++) {
		struct fuse_entry_param e;
		const char *name;
		fuse_ino_t child;
		if (at < 2) {
			name = at ? ".." : ".";
			child = 0;
			memset(&e, 0, sizeof e);
			e.attr.st_ino = ino;
			e.attr.st_mode = S_IFDIR;
		} else {
			uint64_t n = at - 1;
			if (ino == FUSE_ROOT_ID) {
				name = kinds[at - 2];
				child = at;
			} else if (is_kind(ino)) {
				if (!entries[n].name || entries[n].directory != (int)ino)
					continue;
				name = entries[n].name;
				child = 2 * n + FIRST;
			} else {
				name = "mounts.json";
				child = ino + 1;
			}
			if (plus)
				found(&e, child);
			else {
				e.attr.st_ino = child;
				e.attr.st_mode = is_kind(ino) || ino == FUSE_ROOT_ID ? S_IFDIR : S_IFREG;
			}
		}
		size_t needs = plus ? fuse_add_direntry_plus(req, buffer + filled, size - filled, name, &e, at + 1)
				    : fuse_add_direntry(req, buffer + filled, size - filled, name, &e.attr, at + 1);
		if (needs > size - filled)
			break;
		filled += needs;
	}
	fuse_reply_buf(req, buffer, filled);
	free(buffer);
}

static void do_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	(void)fi;
	list(req, ino, size, off, 0);
}

static void do_readdirplus(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	(void)fi;
	list(req, ino, size, off, 1);
}

static void do_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	(void)ino;
	fi->keep_cache = 1;
	fuse_reply_open(req, fi);
}

static void do_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	(void)ino;
	(void)fi;
	size_t all = sizeof content - 1;
	size_t rest = (size_t)off < all ? all - off : 0;
	fuse_reply_buf(req, content + (all - rest), rest < size ? rest : size);
}

static const struct fuse_lowlevel_ops operations = {
	.lookup = do_lookup,
	.getattr = do_getattr,
	.mkdir = do_mkdir,
	.rmdir = do_rmdir,
	.rename = do_rename,
	.opendir = do_opendir,
	.readdir = do_readdir,
	.readdirplus = do_readdirplus,
	.open = do_open,
	.read = do_read,
};

int main(int argc, char **argv)
{
	if (argc < 3) {
		fprintf(stderr, "usage: %s MOUNTPOINT ENTRIES [OPTIONS]\n", argv[0]);
		return 2;
	}
	clock_gettime(CLOCK_REALTIME, &started);
	grow();
	for (long n = 1, all = atol(argv[2]); n <= all; n++) {
		char name[32];
		snprintf(name, sizeof name, "s%08ld", n);
		add(4, name);
	}
	char *mountpoint = argv[1];
	argv[2] = argv[0];
	struct fuse_args args = FUSE_ARGS_INIT(argc - 2, argv + 2);
	struct fuse_session *session = fuse_session_new(&args, &operations, sizeof operations, NULL);
	if (!session)
		return 1;
	fuse_set_signal_handlers(session);
	if (fuse_session_mount(session, mountpoint))
		return 1;
	puts("ready");
	fflush(stdout);
	int failed = fuse_session_loop(session);
	fuse_session_unmount(session);
	fuse_remove_signal_handlers(session);
	fuse_session_destroy(session);
	fuse_opt_free_args(&args);
	return failed != 0;
}
