package agent

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/windows"
)

// onWine says that this is no Windows, but wine, which lacks some of it.
func onWine() bool {
	return windows.NewLazySystemDLL("ntdll.dll").NewProc("wine_get_version").Find() == nil
}

// The state folder is administrators', also where a user made it before.
func TestStateFolderOfWindows(t *testing.T) {
	if onWine() {
		t.Skip("wine makes owners and rights up from those of Unix")
	}
	dir := filepath.Join(t.TempDir(), "state")
	must(t, os.Mkdir(dir, 0o777))
	must(t, store{dir}.prepare())
	sd, err := windows.GetNamedSecurityInfo(dir, windows.SE_FILE_OBJECT, windows.OWNER_SECURITY_INFORMATION|windows.DACL_SECURITY_INFORMATION)
	must(t, err)
	owner, _, err := sd.Owner()
	must(t, err)
	if !owner.IsWellKnown(windows.WinBuiltinAdministratorsSid) {
		t.Errorf("it belongs to %s", owner)
	}
	if text := sd.String(); strings.Contains(text, ";;;WD)") || strings.Contains(text, ";;;BU)") || !strings.Contains(text, ";;;BA)") {
		t.Errorf("its rights are %s", text)
	}
	must(t, os.WriteFile(filepath.Join(dir, "key"), []byte("secret"), 0o600))

	link := filepath.Join(t.TempDir(), "link")
	if out, err := exec.Command("cmd", "/c", "mklink", "/J", link, dir).CombinedOutput(); err != nil {
		t.Skipf("no junctions here: %v %s", err, out)
	}
	if err := (store{link}).prepare(); err == nil || !strings.Contains(err.Error(), "link") {
		t.Errorf("a junction is taken for the folder: %v", err)
	}
}

// The certificate comes into the machine's store with its key.
func TestImportPair(t *testing.T) {
	ca := newAuthority(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(rsaKey)
	must(t, err)
	rsaCert := ca.sign(t, x509.Certificate{DNSNames: []string{"rsa.example"}}, rsaKey.Public(), time.Hour)
	ecCert, ecKey := ca.pair(t, x509.Certificate{DNSNames: []string{"ec.example"}})
	for name, pair := range map[string][2]string{
		"RSA": {rsaCert, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))}, "ECDSA": {ecCert, ecKey},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := tls.X509KeyPair([]byte(pair[0]), []byte(pair[1]))
			must(t, err)
			if err := importPair(p); err != nil {
				if name == "ECDSA" && onWine() {
					t.Skipf("wine's store takes RSA keys alone: %v", err)
				}
				t.Fatal(err)
			}
			store, err := windows.UTF16PtrFromString("MY")
			must(t, err)
			h, err := windows.CertOpenStore(windows.CERT_STORE_PROV_SYSTEM_W, 0, 0, windows.CERT_SYSTEM_STORE_LOCAL_MACHINE, uintptr(unsafe.Pointer(store)))
			must(t, err)
			defer windows.CertCloseStore(h, 0)
			found := false
			for c, err := windows.CertEnumCertificatesInStore(h, nil); c != nil && err == nil; c, err = windows.CertEnumCertificatesInStore(h, c) {
				found = found || string(unsafe.Slice(c.EncodedCert, c.Length)) == string(p.Leaf.Raw)
			}
			if !found {
				t.Error(`it is not in LocalMachine\My`)
			}
		})
	}
}
